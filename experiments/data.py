"""`python -m experiments.data`: the console command `jaxvaccine data` from a checkout; --help lists its flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("data")
