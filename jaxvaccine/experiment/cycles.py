"""Fine-tuned again and again: users in turn, one after the other, and between them the provider aligns again or not.

A chain is (backbone, method, again): aligned with the method, it goes through all cycles; behind every cycle but the
last it is aligned again with `again`. All seeds of a chain are lanes. Each link computes what `finetune --aligned` or
`align --start` computes of the one before (tests/experiments/studies/test_cycles.py compares them). In the folder
aligned/ is a plan of the first alignments, a file a chain and seed beside it.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxvaccine.checkpoints.identity import adapter_identity
from jaxvaccine.data.batching import stream_seed
from jaxvaccine.experiment import inputs, lanes, results, runs, stage
from jaxvaccine.experiment.align import AlignConfig, batch_sources, load_data, tokenize
from jaxvaccine.experiment.attack import aligned_prompts, attack_sources, read_data
from jaxvaccine.experiment.attack_config import AttackAdapter, AttackConfig
from jaxvaccine.experiment.attack_rows import tokenize_attack
from jaxvaccine.experiment.attack_scores import as_attacked
from jaxvaccine.experiment.carry_out import carry_out
from jaxvaccine.experiment.chain import together
from jaxvaccine.experiment.checks import MadeOf, check_plan
from jaxvaccine.experiment.config import FieldError, flat, require
from jaxvaccine.experiment.judging import probe
from jaxvaccine.experiment.lane_cells import new_lanes, with_aligned
from jaxvaccine.experiment.lane_scores import Scorer
from jaxvaccine.experiment.layer_choice import of_alignment
from jaxvaccine.experiment.plan_folder import result_path
from jaxvaccine.experiment.plans import Plan, Settings, align_folder, cell_configs, errors_of_attack, folder_name
from jaxvaccine.experiment.results import Cell, Row
from jaxvaccine.json_files import read_json, read_json_object, write_json
from jaxvaccine.llama_config import LoraConfig

NOTHING = "none"  # of `again`: not aligned again
ALIGNED = "aligned"  # the folder of the plan of first alignments
AGAIN = "again="  # what the column "attack" of a chain's rows has before the method that aligns again


class Cycles(NamedTuple):
    """What the chains of a folder go through.

    Attributes:
      backbones, methods, seeds: as of a plan.
      users: attacks, as of a plan, in turn.
      again: methods that align again, as of a plan's alignments; NOTHING for none.
      count: of cycles, a user's fine-tuning each.
      adapter: of the alignments between: the same adapter, or a new one on the merged weights.
    """

    backbones: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    users: tuple[str, ...]
    again: tuple[str, ...]
    count: int
    adapter: Literal["continue", "new"] = "continue"

    def user(self, cycle: int) -> str:
        """Whose turn it is, of cycles from 1 on."""
        return self.users[(cycle - 1) % len(self.users)]

    @property
    def chains(self) -> Iterator[tuple[str, str, str]]:
        return ((backbone, method, again) for backbone in self.backbones for method in self.methods
                for again in self.again)

    @property
    def plan(self) -> Plan:
        """Of all that a chain may do, for what can be checked of it beforehand."""
        aligning = (text for text in self.again if text != NOTHING)
        return Plan.product(self.backbones, tuple(dict.fromkeys((*self.methods, *aligning))), self.users, self.seeds)


def seed_of(seed: int, cycle: int, stage_name: Literal["attack", "alignment"]) -> int:
    """Of a cycle's fine-tuning, or of the alignment behind it. The first fine-tuning is that of a plan's cell."""
    return seed if (cycle, stage_name) == (1, "attack") else stream_seed(seed, f"{stage_name} {cycle}") % 2**32


def chain_path(root: Path, backbone: str, method: str, again: str, seed: int) -> Path:
    """Of a chain's rows."""
    return root / folder_name(backbone) / folder_name(method) / folder_name(AGAIN + again) / f"seed{seed}.json"


def run_cycles(cycles: Cycles, settings: Settings, root: Path, fixed: dict[str, Any], overwrite: bool = False,
               say: Callable[[str], None] = print) -> None:
    """Carries out the chains that are not there yet; results.csv in the folder has all rows.

    Rows of a chain have `AGAIN` and its `again` in the place of the attack, and as their step the number of cycles that
    it has gone through: of stage "attack" behind the user's fine-tuning, of "alignment" behind the alignment that
    follows; the first alignment has step 0.

    Args:
      cycles: may have more backbones, methods, seeds and `again` in a later call.
      settings: what the cells of a plan start from, as of `carry_out`.
      root: the folder.
      fixed: what may not differ from one call to the next.
      overwrite: delete an earlier one first.
      say: told of every chain.

    Raises:
      FieldError, ValueError: a setting that is not valid, before anything is trained.
      FileExistsError: the folder is of other settings, or a chain in it was made of other inputs.
    """
    made_of = check_plan(cycles.plan, settings, root / ALIGNED, True, check_link)
    for backbone, method, again in cycles.chains:
        check_shapes(cycles, settings, backbone, method, again)
    runs.open_run(root, "cycles", fixed, {}, overwrite=overwrite)
    carry_out(Plan(cycles.backbones, tuple((method, "") for method in cycles.methods), cycles.seeds), settings,
              root / ALIGNED, as_lanes=True, say=lambda line: None)
    of_chain = {chain: {seed: _made_of(cycles, root, made_of, *chain, seed) for seed in cycles.seeds}
                for chain in cycles.chains}
    missing = {chain: [seed for seed in of if not _is_there(chain_path(root, *chain, seed), of[seed])]
               for chain, of in of_chain.items()}
    if any(missing.values()):
        probe(settings.scores.judge, bool(settings.scores.tests.harmful_test))
    collect(cycles, root)
    for chain, seeds in missing.items():
        if seeds:
            rows, links = _carry_out(cycles, settings, root, *chain, seeds)
            for seed, of_seed, of_links in zip(seeds, rows, links, strict=True):
                path = chain_path(root, *chain, seed)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"rows": of_seed, "links": of_links, "inputs": of_chain[chain][seed]})
            collect(cycles, root)
            say(f"{chain[0]} {chain[1]}, {AGAIN}{chain[2]}, seed {','.join(map(str, seeds))}: {cycles.count} cycles")


def check_link(aligned: AlignConfig, attacked: AttackConfig | None) -> None:
    """Raises FieldError for an attack that is no link: what it trains has to be an adapter, and all of it known
    beforehand."""
    del aligned
    if attacked is None:
        return
    require(attacked.adapter.trains == "adapter" and not attacked.leaves_model, "attacks", attacked.adapter.trains,
            "attacks that train an adapter and leave one: a chain goes on with it")
    require(attacked.data.user_rows == "drawn", "attacks", attacked.data.user_rows, "user_rows=drawn in a chain")
    require(not attacked.takes_fisher, "attacks", flat(attacked)["defense"],
            "none that takes Fisher weights in a chain")
    require(not of_alignment(attacked.adapter.only_layers), "attacks", attacked.adapter.only_layers,
            "numbers of layers in a chain")


def check_again(cycles: Cycles, settings: Settings) -> None:
    """Raises FieldError for an alignment between that is not valid, before `check_plan` calls it a first one."""
    for again in cycles.again:
        if again != NOTHING:
            _again_config(settings, Path("-"), cycles.backbones[0], again, cycles.seeds[0])


def check_shapes(cycles: Cycles, settings: Settings, backbone: str, method: str, again: str) -> None:
    """Raises FieldError if an adapter is to train on in a link that wants one of another shape, or a link wants another
    base than the chain's."""
    aligned = cell_configs(settings, Path("-"), Cell(backbone, method, "", cycles.seeds[0]))[0]
    shape, last = aligned.adapter.lora(), aligned
    for cycle in range(1, cycles.count + 1):
        attacked = _attack_config(cycles, settings, backbone, method, cycle, cycles.seeds[0])
        with errors_of_attack(cycles.user(cycle)):
            shape = _resolve(attacked, last, shape).sites().lora()
        if again != NOTHING:
            last = _again_config(settings, Path("-"), backbone, again, cycles.seeds[0])
            for name in ("dtype", "quantisation"):
                found, wanted = getattr(last.model, name), getattr(aligned.model, name)
                require(found == wanted, "again", again, f"{name}={wanted}, as {method}, and not {found}")
            own = last.adapter.lora()
            require(cycles.adapter == "new" or _same(own, shape), "again", again,
                    f"an adapter of {shape} as the user's, or --again_adapter=new")
            shape = own


def _again_config(settings: Settings, root: Path, backbone: str, again: str, seed: int) -> AlignConfig:
    """Of an alignment between. Raises FieldError: it is not valid."""
    try:
        return cell_configs(settings, root, Cell(backbone, again, "", seed))[0]
    except FieldError as error:
        raise FieldError("again" if error.name == "defenses" else error.name, error.message) from error


def _same(one: LoraConfig, other: LoraConfig) -> bool:
    return dataclasses.replace(one, dropout=other.dropout) == other


def _attack_config(cycles: Cycles, settings: Settings, backbone: str, method: str, cycle: int, seed: int
                   ) -> AttackConfig:
    return cell_configs(settings, Path("-"), Cell(backbone, method, cycles.user(cycle), seed))[1]


def _resolve(attacked: AttackConfig, last: AlignConfig, shape: LoraConfig) -> AttackAdapter:
    """An attack's adapter, given the last alignment and the shape of the adapter that there is."""
    there = {"rank": shape.rank, "lora_alpha": shape.alpha, "dropout": shape.dropout, "targets": shape.targets}
    return attacked.adapter.resolve({**flat(last), **there}, attacked.method)


def _made_of(cycles: Cycles, root: Path, made_of: dict[Cell, MadeOf], backbone: str, method: str, again: str, seed: int
             ) -> dict[str, Any]:
    """The hashes of what a chain is made of: the model, the data of all its links, the adapter that it starts with."""
    aligned = Cell(backbone, method, "", seed)
    found = {**made_of[aligned], "adapter": adapter_identity(inputs.adapter_dir(
        align_folder(root / ALIGNED, aligned)))}
    found["users"] = {text: made_of[aligned._replace(attack=text)]["attack"] for text in cycles.users}
    return found if again == NOTHING else {**found, "again": made_of[Cell(backbone, again, "", seed)]["alignment"]}


def _is_there(path: Path, made_of: dict[str, Any]) -> bool:
    if not path.exists():
        return False
    if changed := runs.differences(read_json_object(path).get("inputs", {}), made_of, "found", "expected"):
        raise FileExistsError(f"{path}: holds a chain of other inputs than there are now; choose another folder, or "
                              "--overwrite to delete it. " + "; ".join(changed))
    return True


def collect(cycles: Cycles, root: Path) -> None:
    """Writes the table of all chains that are there."""
    rows: list[Row] = []
    for backbone, method, again in cycles.chains:
        for seed in cycles.seeds:
            if (path := chain_path(root, backbone, method, again, seed)).exists():
                first = read_json(result_path(root / ALIGNED, Cell(backbone, method, "", seed)))["rows"]
                last = max(row["step"] for row in first)
                rows += [{**row, "attack": AGAIN + again, "step": 0} for row in first
                         if row["step"] == last and row.get("layer") is None]
                rows += read_json(path)["rows"]
    results.write(root / results.TABLE, results.table(rows))


def _carry_out(cycles: Cycles, settings: Settings, root: Path, backbone: str, method: str, again: str,
               seeds: Sequence[int]) -> tuple[list[list[Row]], list[list[dict[str, Any]]]]:
    """(rows, links) of every seed."""
    cells = [Cell(backbone, method, "", seed) for seed in seeds]
    aligned = last = cell_configs(settings, root / ALIGNED, cells[0])[0]
    tokenizer = stage.load_tokenizer(backbone, aligned.model.revision)
    base = stage.load_base(backbone, aligned.model.dtype, revision=aligned.model.revision,
                           quantisation=aligned.model.quantisation)
    of = with_aligned(new_lanes(aligned, base, seeds), root / ALIGNED, cells)
    scorer = Scorer(settings.scores, tokenizer)
    known = _prompts(aligned)
    rows: list[list[Row]] = [[] for _ in seeds]
    links: list[list[dict[str, Any]]] = [[] for _ in seeds]

    def score(stage_name: str, cycle: int, what: str, own: Sequence[int], by: Scorer) -> None:
        found, _ = by(of, seeds)
        for i, cell in enumerate(cells):
            rows[i] += results.score_rows(cell._replace(attack=AGAIN + again), stage_name, cycle, found[i],
                                          settings.by_category)
            links[i].append({"stage": stage_name, "cycle": cycle, "what": what, "seed": own[i]})

    for cycle in range(1, cycles.count + 1):
        own = [seed_of(seed, cycle, "attack") for seed in seeds]
        attacked = _attack_config(cycles, settings, backbone, method, cycle, seeds[0])
        of = _fine_tune(of, attacked, last, known, tokenizer, own)
        score("attack", cycle, cycles.user(cycle), own, scorer.of(as_attacked(scorer.config, attacked)))
        if again != NOTHING and cycle < cycles.count:
            last = _again_config(settings, root / ALIGNED, backbone, again, seeds[0])
            own = [seed_of(seed, cycle, "alignment") for seed in seeds]
            of = _align_again(of, last, cycles.adapter, tokenizer, own)
            known = together((known, _prompts(last)))
            score("alignment", cycle, again, own, scorer)
    return rows, links


def _prompts(config: AlignConfig) -> dict[str, list[str]]:
    return {name: stage.prompts_of(of) for name, of in load_data(config.data, config.method).items()}


def _fine_tune(of: lanes.Lanes, config: AttackConfig, last: AlignConfig, known: dict[str, list[str]], tokenizer: Any,
               seeds: Sequence[int]) -> lanes.Lanes:
    adapter, sources = _resolve(config, last, of.model.lora), []
    for seed in seeds:
        read, poisoned = read_data(config, seed, aligned_prompts(known), tokenizer)
        tokenized, _ = tokenize_attack(tokenizer, read, poisoned, config.data, last.data.form)
        sources.append(attack_sources(config, tokenized)[0])
    lora = adapter.sites().lora()
    of = (lanes.merged(of, lora, seeds) if adapter.adapter == "new" else of._replace(model=of.model.clone(lora=lora)))
    return lanes.train(of, config.method, config.training, config.data.bucket, sources, seeds,
                       adapter.layer_mask(of.model.config.num_layers), None, config.run.progress, "fine-tune",
                       config.objective)[0]


def _align_again(of: lanes.Lanes, config: AlignConfig, adapter: Literal["continue", "new"], tokenizer: Any,
                 seeds: Sequence[int]) -> lanes.Lanes:
    tokenized = tokenize(tokenizer, load_data(config.data, config.method), config.data)
    sources = batch_sources(config.method, tokenized, config.training.batch_size, config.data.harmful_batch_size)
    lora = config.adapter.lora()
    of = lanes.merged(of, lora, seeds) if adapter == "new" else of._replace(model=of.model.clone(lora=lora))
    return lanes.train(of, config.method, config.training, config.data.bucket, [sources] * len(seeds), seeds,
                       progress=config.run.progress, description="align again")[0]
