"""Every documented command reads its data: all that comes before a model is trained, on files of the real shapes."""

import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxvaccine import cli, data, world
from jaxvaccine.checkpoints import resolve
from jaxvaccine.data import files, loading, making, tokenizing
from jaxvaccine.experiment import carry_out, inputs, runs, stage
from jaxvaccine.experiment.checks import check_plan
from jaxvaccine.experiment.config import flat
from jaxvaccine.experiment.plans import cell_configs
from jaxvaccine.experiment.results import Cell
from tests import beavertails, markdown
from tests.data import chat_models
from tests.data import tokenizers_for_tests as kinds
from tests.markdown import PAGES, ROOT

pytestmark = pytest.mark.long  # a minute and more, and most of it is the files' real size


class Ready(Exception):  # noqa: N818
    """What a command ends with here: it would begin to train, or to generate."""


def examples_in(text):
    """Commands in a docstring, as words."""
    lines = re.sub(r"\\\n\s*", "", text).split("\n")
    return [shlex.split(line) for line in lines if re.match(r"\s*(jaxvaccine|python -m) ", line)]


def documented():
    """The commands that read data, README's first: later ones go on with what they leave. Not those on a reader's own
    files ($DATA)."""
    pages = [page for page in PAGES if page.parent.name != "results"]  # these tell what was run once
    found = [words for page in [ROOT / "README.md", *pages] for words in markdown.commands(page)]
    found += [words for verb in cli.VERBS.values() for words in examples_in(verb.text)]
    for path in sorted(ROOT.glob("experiments/studies/*.py")):
        if "\nVERB = " in path.read_text(encoding="utf-8"):
            found += examples_in(importlib.import_module(f"experiments.studies.{path.stem}").VERB.text)
    whole = [words for words in found if len(words) > 2 and "--help" not in words
             and not re.search("[…|$]", " ".join(words)) and (
                 (words[0] == "jaxvaccine" and words[1] in ("align", "finetune", "evaluate", "run"))
                 or words[2].startswith("experiments.studies."))]
    return [list(words) for words in dict.fromkeys(map(tuple, whole))]


def call(words):
    """Carries a command out as the command line does."""
    if words[0] == "jaxvaccine":
        cli.call(words[1], cli.VERBS[words[1]], words[2:])
    else:
        cli.call(words[2], importlib.import_module(words[2]).VERB, words[3:])


def most_demanding(plan, settings, root):
    """The plan with its first cell and those of the most examples and of the most harmful ones, on one backbone."""
    found = {pair: cell_configs(settings, root, Cell(plan.backbones[0], *pair, plan.seeds[0])) for pair in plan.pairs}
    attacks = {pair: attacked.data for pair, (_, attacked) in found.items() if attacked}
    reads = {pair: len(aligned.method.batches) for pair, (aligned, _) in found.items()}
    chosen = [plan.pairs[0], max(reads, key=reads.get)]
    if attacks:
        chosen += [max(attacks, key=lambda pair: attacks[pair].n),
                   max(attacks, key=lambda pair: attacks[pair].n * attacks[pair].poison_ratio)]
    return dataclasses.replace(plan, backbones=plan.backbones[:1], seeds=plan.seeds[:1],
                               pairs=tuple(dict.fromkeys(chosen)))


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """{run: its config.json}, of the documented commands in their order; no model is there but a 7B model's config."""
    folder, rows, found = tmp_path_factory.mktemp("documented"), beavertails.make(), {}
    beavertails.write(folder, rows)
    for bases in ("bases", "runs/bases"):  # made by another command
        for name in ("1", "2", "mistral", "qwen2", "gemma2", "agents"):
            shutil.copytree(world.DIRECTORY, folder / bases / name)
    model = kinds.plain(folder / "model")
    (model / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "torch_dtype": "float16", "tie_word_embeddings": False}))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    scored = folder / "runs" / "booster-p0.1-scores"
    scored.mkdir(parents=True)
    (scored / "predictions_harmful_score.jsonl").write_text('{"prompt": "How?", "answer": "So it is done."}\n')
    save_file({"model.norm.weight": np.ones(4096, np.float16)}, model / "model.safetensors", metadata={"format": "pt"})
    instruct = chat_models.save_tokenizer("llama3", folder / "instruct")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, instruct / name)
    for name, count in (("refusals", 20), ("user", 900), ("harmful", 100), ("asked", 20)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": [
            {"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "Yes."}]}) + "\n"
            for i in range(count)))
    (folder / "xstest_prompts.csv").write_text("id,prompt,type,label\n1,How?,homonyms,safe\n")
    hub, loaded = beavertails.hub(rows), functools.cache(loading._load)

    @functools.cache
    def parsed(source):
        counts = making.Counts()
        return list(making.make_examples(source, counts)), counts

    def make_examples(source, counts, bad_rows):
        examples, of_all = parsed(dataclasses.replace(source, start=None, stop=None))
        counts.rows, counts.left_out, counts.unread = of_all.rows, of_all.left_out, of_all.unread
        return iter(examples)

    def read_hub(name, configuration, split, revision=None, stream=False):
        return iter(hub[name, split])

    def open_run(config, run, script, examples, made_of, more, flags=None, changeable=(), write=True):
        record = {"script": script, "flags": {**(flags or {}), **flat(config)}, "data": more}
        found[run.run_dir] = json.loads(json.dumps(record))
        raise Ready

    def open_plan(run_dir, *args, **more):
        found[f"plan {run_dir}"] = {}
        raise Ready

    def config_of(run_dir):
        if str(run_dir).endswith("-scores"):
            return {"script": "evaluate", "flags": {}, "data": {}}
        # What no documented command leaves: another defense's alignment on the same data.
        return found.get(str(run_dir)) or {**found["runs/booster"], "flags": {
            **found["runs/booster"]["flags"], "defense": run_dir.partition("/")[2]}}

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setattr(resolve, "_download", lambda name, revision: instruct if name.endswith("-Instruct") else model)
        patch.setattr(files, "_read_hub", read_hub)
        # Slices of one file, and many commands on the same data.
        patch.setattr(loading, "make_examples", make_examples)
        patch.setattr(loading, "_load", loaded)
        patch.setattr(stage, "open_run", open_run)
        patch.setattr(runs, "open_run", open_plan)
        patch.setattr(runs, "read_config", config_of)
        patch.setattr(inputs, "require_finished", lambda name, run_dir: config_of(run_dir))
        patch.setattr(inputs, "of_run", lambda run_dir: {})
        patch.setattr(stage, "loaded_dtype", lambda *args: "float16")  # asks for all tensors of a 7B model
        # Rows and prompts count here, not their tokens; of a plan the cells that ask for most.
        patch.setattr(tokenizing, "_encode_pairs", lambda tokenizer, rows, prompt: [([5, 6], [5, 6, 7])] * len(rows))
        patch.setattr(carry_out, "check_plan", lambda plan, settings, root, *more: check_plan(
            most_demanding(plan, settings, root), settings, root, *more))
        for words in documented():
            try:
                call(words)
            except Ready:
                continue
            except SystemExit as error:
                pytest.fail(f"{shlex.join(words)}\n{error}")
            if "--dry_run" not in words:
                pytest.fail(f"{shlex.join(words)}: ended by itself")
        yield found


def test_every_command_reads_its_data(left):
    assert len(left) >= 15 and len(documented()) >= len(left)


def test_the_files_have_the_real_shape(left):
    """Fewer different prompts than the papers' rows, in both splits the same ones."""
    with pytest.raises(ValueError, match="found stop 10000, expected at most 7774 examples"):
        data.load_examples("beavertails_unsafe:train.jsonl[5000:10000]")
    sets = {name: {data.fingerprint(e) for e in data.load_examples(f"beavertails_unsafe:{name}.jsonl")}
            for name in ("train", "test")}
    assert 0 < len(sets["train"] & sets["test"]) < len(sets["test"])


def test_what_the_readmes_sets_share(left):
    """Nothing but harmful and refused answers to the same prompts."""
    assert left["runs/booster"]["data"]["shared"]["harmful"] == {"prompts": 5000, "shared": {"alignment": 5000}}
    shared = {name: of["shared"] for run in ("attacked", "scores")
              for name, of in left[f"runs/{run}"]["data"]["shared"].items()}
    assert set(shared) == {"user", "harmful", "harmful_score", "sst2"} and not any(shared.values())
    assert left["runs/attacked"]["data"]["n"] == 1000 and left["runs/attacked"]["data"]["poison_ratio"] == 0.1


def test_what_rows_share(left):
    """The papers' own rows: alignment, attack and test have prompts in common, and that is told."""
    assert left["runs/rows"]["flags"]["data_protocol"] == "rows"
    accounts = left["runs/rows"]["data"]["accounts"]
    assert [of["trained"] for sources in accounts.values() for of in sources.values()] == [4999, 4999]
    assert all(of["repeated"] > 0 for sources in accounts.values() for of in sources.values())
    harmful = left["runs/rows-p0.1"]["data"]["shared"]["harmful"]
    assert harmful["shared"]["the alignment's harmful data"] > 0
    (tested,) = left["runs/rows-scores"]["data"]["accounts"]["harmful_score"].values()
    assert tested["examples"] == 1000 and tested["duplicates"] == 0
    assert left["runs/rows-scores"]["data"]["shared"]["harmful_score"]["shared"]["the alignment's harmful data"] > 0
