"""`python -m jaxvaccine`: the console command."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main()
