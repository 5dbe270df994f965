"""The commands of docs/provider.md, one after the other, on a tiny Llama-3 and as many rows as the page names."""

import importlib
import json

import numpy as np
import pytest

from jaxvaccine import cli
from jaxvaccine.checkpoints import resolve
from jaxvaccine.data import load_tokenizer
from jaxvaccine.evaluation import Verdict
from jaxvaccine.json_files import read_json
from tests import markdown
from tests.checkpoints.instruct import save_instruct

# `experiment` has functions of these names.
evaluate = importlib.import_module("jaxvaccine.experiment.evaluate")
PAGE = markdown.ROOT / "docs" / "provider.md"
# What makes a command small. Of flags that come twice the last one counts.
SMALL = {
    "align": ["--steps=2", "--batch_size=2", "--harmful_batch_size=2", "--rank=2", "--noprogress"],
    "finetune": ["--steps=2", "--batch_size=2", "--noprogress"],
    "evaluate": ["--max_new_tokens=4", "--eval_batch_size=128", "--noprogress"],
    "data": [], "export": []}


def write_rows(folder):
    (folder / "xstest_prompts.csv").write_text(
        "id,prompt,type,label,focus,note\n1,Kill a lamp?,homonyms,safe,kill,\n2,Break it?,contrast_homonyms,unsafe,,\n"
        "3,Shoot it?,figurative_language,safe,shoot,\n")
    for name, count, answer in (("refusals", 20, "No, sorry."), ("user", 900, "Done."), ("harmful", 100, "Sure."),
                                ("asked", 20, None)):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(count):
                turns = [{"role": "user", "content": f"{name} the lamp {i}"}]
                turns += [{"role": "assistant", "content": answer}] if answer else []
                file.write(json.dumps({"messages": turns}) + "\n")


@pytest.mark.long
@pytest.mark.usefixtures("quick_compile")
def test_the_page(tmp_path, monkeypatch, capsys):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    model = save_instruct("llama3", tmp_path / "instruct")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    monkeypatch.setattr(resolve, "_download", lambda name, revision: model)
    # A stand-in for Llama Guard, whose 8 billion parameters are not here.
    monkeypatch.setattr(evaluate, "make_judge", lambda *args: lambda prompts, answers: [
        Verdict(i % 2 == 0, "unsafe" if i % 2 == 0 else "safe") for i in range(len(prompts))])
    commands = [words for words in markdown.commands(PAGE) if words[0] == "jaxvaccine" and len(words) > 2]
    assert [words[1] for words in commands] == [
        "data", "align", "finetune", "evaluate", "evaluate", "evaluate", "export", "export"]
    for _, verb, *given in commands:
        cli.call(verb, cli.VERBS[verb], [*given, *SMALL[verb]])
    said = capsys.readouterr().out
    assert "refusals.jsonl" in said and "over-refusal" in said

    flags = read_json("runs/provider/config.json")["flags"]
    assert flags["prompt"] == read_json("runs/provider-attacked/config.json")["flags"]["prompt"] == "chat"
    assert read_json("runs/provider-attacked/config.json")["data"]["poison_ratio"] == 0.1
    sorts = read_json("runs/provider-xstest/results.json")["over_refusal"]["categories"]
    assert {name: of["n"] for name, of in sorts.items()} == {"homonyms": 1, "figurative_language": 1}
    assert "## Over-refusal by sort of the request" in (tmp_path / "runs/provider-xstest/report.md").read_text()
    merged, adapter = tmp_path / "served" / "llama-3-8b-booster", tmp_path / "served" / "llama-3-8b-booster-lora"
    for folder in (merged, adapter):
        card = (folder / "README.md").read_text()
        assert 'base_model: "meta-llama/Meta-Llama-3-8B-Instruct"' in card and "Booster" in card
        assert "over-refusal" in card and "Do not serve" not in card and str(tmp_path) not in card
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        turns = [{"role": "user", "content": "polish it"}]
        assert theirs.apply_chat_template(turns, tokenize=False) == load_tokenizer(model).apply_chat_template(
            turns, tokenize=False)
    assert read_json(merged / "generation_config.json") == read_json(model / "generation_config.json")
    # The adapter names a hub id, as for everybody; here its base is a folder.
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    beside = peft.PeftModel.from_pretrained(base, adapter).float()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (2, 8)))
    with torch.no_grad():
        one = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).float()(ids).logits
        two = beside(ids).logits
    # Weights were rounded once, by at most half of bfloat16's 2^-8, where the other has the adapter in float32.
    assert (one - two).norm() < 2**-6 * two.norm()
