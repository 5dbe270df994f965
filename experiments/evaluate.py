"""`python -m experiments.evaluate`: the console command `jaxvaccine evaluate` from a checkout; --help lists its
flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("evaluate")
