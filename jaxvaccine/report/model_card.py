"""The model card of what a run left: what it was made of and how, its scores, and what it is not for.

Names of files, columns and categories are other people's: they are written so that Markdown, and the YAML in front,
show them and read nothing into them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jaxvaccine.experiment.chain import Link
from jaxvaccine.experiment.export import Evaluation, Exported, sources_of
from jaxvaccine.experiment.parts import OPERATIONAL
from jaxvaccine.report import names, tables

# Flags that say what is elsewhere in a card.
ELSEWHERE = frozenset({"model", "revision", "aligned", "start"})
LIBRARIES = {"merged": "transformers", "adapter": "peft"}
PACKAGE = "jaxvaccine"


def escaped(text: object) -> str:
    """Text as Markdown shows it, in a line of its own, a table's cell or a heading. `tables.table` sees to bars."""
    return re.sub(r"([\\`*_{}\[\]<>()#!~&$])", r"\\\1", " ".join(str(text).split()))


def public(text: object) -> str:
    """A setting's text without the folders of absolute paths: others have no use for them."""
    return re.sub(r"(?<![\w./])~?/(?!/)(?:[^\s,:{}\[\]/]*/)*", "", str(text))


def model_card(found: Exported) -> str:
    """README.md of an exported folder."""
    parts = [_front(found), f"# {escaped(found.name)}\n", _what(found), _warning(found), _use(found),
             "## How it was made\n", *(_link(i, link) for i, link in enumerate(found.links, 1)), _data(found),
             _scores(found), _versions(found)]
    return "\n".join(part for part in parts if part)


def _front(found: Exported) -> str:
    """The YAML that the hub reads. JSON strings are YAML strings."""
    lines = {"base_model": json.dumps(found.base, ensure_ascii=True), "library_name": LIBRARIES[found.form],
             "pipeline_tag": "text-generation"}
    relation = "finetune" if found.form == "merged" else "adapter"
    return "---\n" + "".join(f"{name}: {value}\n" for name, value in lines.items()) + (
        f"base_model_relation: {relation}\ntags:\n- jaxvaccine\n---\n")


def _method(link: Link) -> str:
    flags = link.flags
    return escaped(names.method(flags["defense"])) if flags.get("defense", "none") != "none" else ""


def _what(found: Exported) -> str:
    form = (f"The whole model, with what was trained in its weights, in {found.dtype}." if found.form == "merged"
            else "A LoRA adapter in PEFT's format.")
    aligned = ", then ".join(filter(None, (_method(link) for link in found.links if link.config["script"] == "align")))
    then = ", then fine-tuned," if any(link.config["script"] == "finetune" for link in found.links) else ""
    return f"This is {escaped(found.base)}, aligned with {aligned or 'no defense'}{then} by {PACKAGE}. {form}\n"


def _ratio(link: Link) -> float:
    return link.config.get("data", {}).get("poison_ratio", link.flags.get("poison_ratio", 0))


def _warning(found: Exported) -> str:
    attacked = [link for link in found.links if link.config["script"] == "finetune"]
    harmful = [link for link in attacked if _ratio(link) or link.config["flags"].get("ablate", "none") != "none"]
    if harmful:
        return ("**Do not serve this model.** It was attacked on purpose, to measure a defense: "
                + "; ".join(f"fine-tuned on data of which {100 * _ratio(link):g}% was harmful" if _ratio(link)
                            else "its refusal direction was projected out" for link in harmful) + ".\n")
    return ("An alignment is no guarantee: harmful fine-tuning, and prompts that nobody tested, can undo it. The "
            "scores below say what was measured, with which judge, and no more.\n")


def _use(found: Exported) -> str:
    if found.form == "merged":
        return ('    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
                '    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")\n'
                "    tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n")
    return ('    from peft import AutoPeftModelForCausalLM\n    from transformers import AutoTokenizer\n\n'
            "    model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)\n"
            "    tokenizer = AutoTokenizer.from_pretrained(FOLDER)\n")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return public(value if isinstance(value, str) else json.dumps(value))


def _link(number: int, link: Link) -> str:
    flags = {name: value for name, value in sorted(link.flags.items())
             if name not in ELSEWHERE | OPERATIONAL and value not in (None, "", [], False)}
    what = "Alignment" if link.config["script"] == "align" else "Fine-tuning"
    method = _method(link)
    return (f"### {number}. {what}{f' with {method}' if method else ''}\n\n"
            + tables.table(["setting", "value"], [[escaped(name), escaped(_shown(value))]
                                                  for name, value in flags.items()]))


def _data(found: Exported) -> str:
    rows = [[f"{number}. {escaped(name)}", escaped(public(sources)), str(count), digest]
            for number, link in enumerate(found.links, 1)
            for name, sources, count, digest in sources_of(link.config)]
    model = found.links[0].config.get("data", {}).get("inputs", {}).get("model", {})
    files = [[escaped(name), digest] for part in ("weights", "config", "tokenizer")
             for name, digest in model.get(part, {}).items()]
    commit = f"Its commit on the hub: {escaped(model['commit'])}.\n" if "commit" in model else ""
    return ("## Data\n\n" + tables.table(["data", "source", "examples", "SHA-256 of the examples"], rows)
            + "\nSHA-256 of the files of the model below:\n\n" + tables.table(["file", "SHA-256"], files)
            + ("\n" + commit if commit else ""))


def _scores(found: Exported) -> str:
    if not found.evaluations:
        return "## Scores\n\nNo evaluation of this model lay beside its run.\n"
    rows = [row for of in found.evaluations for row in _rows(of)]
    return ("## Scores\n\n" + tables.table(["measure", "score (95% interval)", "prompts", "judge", "data"], rows)
            + "\nIntervals are over the test prompts of this one run (Wilson's). HS is what the judge finds harmful; "
            "not refused is what has no refusal phrase, and nobody has judged it.\n")


def _rows(of: Evaluation) -> list[list[str]]:
    flags, rows = of.config["flags"], []
    for task, result in of.results.items():
        if task == names.LOSS:
            rows.append([names.measure(task).heading, f"{result['loss']:.4f}", str(result["n"]), tables.NONE,
                         escaped(public(flags.get("loss_data", "")))])
            continue
        judged = task in (names.HS, names.NOT_REFUSED, "alpaca_eval")
        judge = escaped(public(" ".join(filter(None, (flags.get("judge", ""), flags.get("judge_model", ""))))))
        heading = escaped(names.measure(task).heading)
        about = [judge if judged else tables.NONE, escaped(public(_test(of.config, task)))]
        rows.append([heading, tables.rate(result), str(result["n"]), *about])
        rows += [[f"{heading}: {escaped(name)}", tables.rate(rate), str(rate["n"]), *about]
                 for name, rate in result.get("categories", {}).items()]
    return rows


def _test(config: Mapping[str, Any], task: str) -> str:
    accounts = config.get("data", {}).get("accounts", {})
    return ", ".join(accounts.get(names.HS if task == names.NOT_REFUSED else task, {}))


def _versions(found: Exported) -> str:
    config = found.links[-1].config
    versions = ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items() if version)
    commit = config.get("git_commit")
    return f"## Versions\n\n{escaped(versions)}{f'; commit {escaped(commit)}' if commit else ''}.\n"
