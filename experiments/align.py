"""`python -m experiments.align`: the console command `jaxvaccine align` from a checkout; --help lists its flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("align")
