"""`python -m experiments.export`: the console command `jaxvaccine export` from a checkout; --help lists its flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("export")
