"""`python -m experiments.run`: the console command `jaxvaccine run` from a checkout; --help lists its flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("run")
