"""`python -m experiments.compare_judges`: the console command `jaxvaccine compare-judges` from a checkout; --help lists
its flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("compare-judges")
