"""`python -m experiments.finetune`: the console command `jaxvaccine finetune` from a checkout; --help lists its
flags."""

from jaxvaccine import cli

if __name__ == "__main__":
    cli.main("finetune")
