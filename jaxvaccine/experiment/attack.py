"""The attack: an aligned model is fine-tuned on a user's data of which a ratio is harmful, once or again and again."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxvaccine import data, defenses
from jaxvaccine.attacks import all_weights
from jaxvaccine.experiment import ablation, chain, inputs, layer_choice, memory, runs, stage, whole
from jaxvaccine.experiment.align import Examples
from jaxvaccine.experiment.attack_config import AttackConfig, AttackData
from jaxvaccine.experiment.attack_rows import Candidates, PoisonedData, selected_in, tokenize_attack
from jaxvaccine.experiment.config import require
from jaxvaccine.experiment.methods import OF_ALL_WEIGHTS, TuningMethod
from jaxvaccine.experiment.objectives import Objective
from jaxvaccine.experiment.parts import aligned_form, check_form, check_prefill
from jaxvaccine.llama import Llama, init_adapter
from jaxvaccine.llama_config import LlamaConfig
from jaxvaccine.losses import causal_lm_loss
from jaxvaccine.quantisation import Kind

TEST = "the test prompts"  # among what an attack's data may not share a prompt with
MIXED_IN = "harmful, mixed in"  # the account of that part, where an objective reads all of the harmful examples


def load_attack(config: AttackData, seed: int, known: Mapping[str, Collection[str]], tokenizer: Any = None
                ) -> PoisonedData:
    """The attack's data. It reads files and nothing else: two calls give the same.

    Args:
      config: names the data, n and poison_ratio.
      seed: of the draw.
      known: {what: fingerprints of its prompts} of all that the model was aligned on; no harmful example may be there,
        unless rows are taken as they are.
      tokenizer: examples that it cuts down to nothing are passed over; without one, none is.

    Raises:
      FieldError, ValueError, FileNotFoundError: as of `data.load` and `data.mix`; a text that the tokenizer would not
        read as text; or user's data with a test prompt.
    """
    rows = config.protocol == "rows"
    pools = {name: data.load(source, config.protocol, config.bad_rows) if source else ([], ())
             for name, source in (("user", config.user_data), ("harmful", config.harmful_data))}
    harmful = pools["harmful"][0]
    tests = stage.prompts_of(data.load_examples(
        config.test_data, config.protocol, config.bad_rows)) if config.test_data else []
    fates = None
    if tokenizer is not None:
        # All of them, so that no seed fails that another passes.
        for pool, _ in pools.values():
            data.check_training_texts(tokenizer, pool, config.form)
        fates = functools.partial(data.training_fates, tokenizer, max_length=config.max_length, prompt=config.form)
    others = {**known, TEST: tests}
    mixture = data.mix(pools["user"][0], harmful, config.n, config.poison_ratio, seed, {} if rows else others, fates,
                       first=rows, candidates=config.candidates)
    n, p = mixture.n, mixture.poison_ratio
    if n != config.n or abs(p - config.poison_ratio) > 1e-6:
        logging.warning("asked for was n = %d, p = %g; trained on are %d examples, %d of them harmful: p = %g",
                        config.n, config.poison_ratio, n, len(mixture.harmful.chosen), p)
    drawn = {"user": mixture.benign, "harmful": mixture.harmful}
    prompts = {name: stage.prompts_of(of.chosen) for name, of in drawn.items()}
    shared = data.shared_prompts(prompts, others)
    for what, count in shared["user"]["shared"].items():
        require(rows or what != TEST, "user_data", config.user_data, "none of the test prompts among them")
        logging.warning("user_data: %d of %d prompts are also in %s", count, shared["user"]["prompts"], what)
    accounts = {name: data.tally(pools[name][1], of.seen, of.fates) for name, of in drawn.items()}
    if config.candidates:
        accounts["user"] = tuple(account._replace(trained=None) for account in accounts["user"])
    return PoisonedData(mixture.examples, harmful, p, accounts, shared, mixture.is_harmful, n)


def read_data(config: AttackConfig, seed: int, known: Mapping[str, Collection[str]], tokenizer: Any = None
              ) -> tuple[Examples, PoisonedData]:
    """(what the attack and the provider's method train on, the former in detail). Arguments and errors as of
    `load_attack`; the harmful part shares no prompt with the provider's alignment data either. An objective's harmful
    batches are of all harmful examples."""
    more: Examples = {}
    if "alignment" in config.reads:
        more["alignment"] = data.load_examples(
            config.data.alignment_data, config.data.protocol, config.data.bad_rows)
    own = {f"the {name} data of the fine-tuning": stage.prompts_of(rows) for name, rows in more.items()}
    poisoned = load_attack(config.data, seed, {**known, **own}, tokenizer)
    if "harmful" in config.reads:
        more["harmful"] = poisoned.harmful
        poisoned = poisoned._replace(accounts={
            MIXED_IN if name == "harmful" else name: of for name, of in poisoned.accounts.items()})
    if config.adapter.trains == "nothing":
        poisoned = poisoned._replace(accounts={
            name: tuple(account._replace(trained=None) for account in of) for name, of in poisoned.accounts.items()})
    return {"user": poisoned.examples, **more}, poisoned


def aligned_prompts(prompts: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
    """`known` of `load_attack`, of a run's recorded prompts."""
    return {f"the alignment's {name} data": of for name, of in prompts.items()}


def masked(defense: defenses.Defense, layers) -> defenses.Defense:
    """The defense on all layers, or on those where `layers` ([L] bool) is true."""
    return defense if layers is None else defenses.only_layers(defense, layers)


def estimator(objective: Objective, method: TuningMethod, model: Llama | None, steps: int, fisher, layers
              ) -> defenses.Defense:
    """What an attack trains with: the attacker's objective on the provider's method, over what trains: an adapter at
    the model's LoRA sites, all weights of a model without any. Arguments as of their `make`, and of `masked`, by which
    an objective's own steps are of these layers too."""
    if model is not None and model.lora is None:
        defense = method.make(model, steps, fisher, OF_ALL_WEIGHTS)
        return defense if layers is None else all_weights.only_layers(defense, layers)
    return masked(objective.make(model, masked(method.make(model, steps, fisher), layers), fisher), layers)


def attack_sources(config: AttackConfig, tokenized: Mapping[str, data.TokenizedExamples]
                   ) -> tuple[stage.Sources, data.TokenizedExamples | None]:
    """(what a step's batches are drawn from, what Fisher weights are taken on, if there are any)."""
    rows = config.training.batch_size
    sizes = dict.fromkeys(config.batches, rows) | {"harmful": config.objective.harmful_rows(rows)}
    sources = {name: (of, sizes[name]) for name, of in tokenized.items() if name in config.batches}
    return sources, tokenized["alignment"] if config.takes_fisher else None


def alignment_fisher(model: Llama, adapter, frozen, alignment: data.TokenizedExamples, batch_size: int, bucket: int,
                     seed: int):
    """Fisher weights of the adapter that training starts from, on one pass over the alignment data."""
    steps = data.steps_for(len(alignment.input_ids), batch_size, 1)
    batches = data.training_batches({"alignment": (alignment, batch_size)}, seed, bucket)
    return defenses.diagonal_fisher(
        causal_lm_loss(model), adapter, frozen, (batches(step)["alignment"] for step in range(steps)))


class Prepared(NamedTuple):
    """An attack before its first step."""

    config: AttackConfig  # with nothing left open
    run_dir: Path
    sources: stage.Sources  # of its batches
    fisher: data.TokenizedExamples | None  # what Fisher weights are taken on
    architecture: LlamaConfig
    layers: np.ndarray | None  # as of `AttackAdapter.layer_mask`
    origin: stage.Origin
    merges: bool  # whether what the run below left is merged into the weights, and its adapter does not train on
    dtype: str  # of the frozen weights
    quantisation: Kind  # and in what they are kept, as aligned
    candidates: Candidates | None  # in the place of the user's rows among the sources
    prompts: ablation.Prompts | None  # of a refusal ablation


def prepare(config: AttackConfig, look: Callable[[Examples], None] = lambda examples: None, write: bool = True
            ) -> Prepared:
    """Reads and checks all that the attack needs but the weights, and opens its folder.

    look and errors: as of `attack`. write: as of `runs.open_run`.
    """
    start = chain.start_from("aligned", config.model.aligned, config.run.run_dir)
    below, alignment = start.below, start.alignment
    adapter = config.adapter.resolve({**below.flags, "defense": alignment.flags["defense"]}, config.method,
                                     config.ablation, start.has_adapter)
    config = dataclasses.replace(config, adapter=adapter, data=config.data.resolve(alignment.flags, alignment.run_dir))
    merges = adapter.adapter == "new" or (adapter.trains != "adapter" and config.leaves_model)
    origin = stage.Origin(start.model, start.revision, start.merged_under(merges))
    of_model, quantisation = (origin.model, origin.revision), runs.flag(below.config, "quantisation")
    architecture = stage.read_architecture(*of_model)
    config.check_weights(architecture, quantisation)
    of_alignment = layer_choice.of_alignment(config.adapter.only_layers)
    layers = config.adapter.layer_mask(architecture.num_layers, layer_choice.active_steps_of_run(
        alignment.run_dir, alignment.config["steps"]) if of_alignment else None)
    dtype = stage.loaded_dtype(origin.model, config.model.dtype, origin.revision)
    config.model.check_attention(architecture, dtype, here=write)
    tokenizer = stage.load_tokenizer(*of_model)
    template, of_prompt = check_form(tokenizer, config.data.form), aligned_form(alignment.flags)
    read, poisoned = read_data(config, config.run.seed, aligned_prompts(start.aligned_prompts), tokenizer)
    look(read)
    check_prefill(tokenizer, config.data.prefill, config.data.form)
    tokenized, candidates = tokenize_attack(tokenizer, read, poisoned, config.data, of_prompt)
    protocol = config.data.protocol
    prompts = ablation.encode(tokenizer, config.ablation, poisoned.harmful, protocol, config.data.form,
                              config.data.bad_rows)
    examples = {**read, "harmful": poisoned.harmful, **ablation.load_harmless(
        config.ablation, protocol, config.data.bad_rows)}
    run_dir = stage.open_run(
        config, config.run, "finetune", examples,
        {"model": inputs.of_model(*of_model), "aligned": inputs.of_run(config.model.aligned)},
        {**stage.training_record(examples, tokenized, poisoned.accounts, poisoned.shared),
         "poison_ratio": poisoned.poison_ratio, "n": poisoned.n, "dtype": dtype, **template,
         **({"layers": layer_choice.numbers(layers)} if of_alignment else {}),
         **chain.record(start.links, "finetune")},
        {"model": origin.model, "revision": origin.revision, "quantisation": quantisation}, write=write)
    sources, fisher = attack_sources(config, tokenized)
    return Prepared(config, run_dir, sources, fisher, architecture, layers, origin, merges, dtype, quantisation,
                    candidates, prompts)


def count_steps(config: AttackConfig, sources: stage.Sources) -> int:
    """How many steps the attack makes; 0 if nothing trains."""
    return 0 if config.adapter.trains == "nothing" else stage.count_steps(config.training, sources)


def step_of(config: AttackConfig, model: Llama, length: int, quantisation: Kind) -> memory.Step:
    """`align.step_of` of an attack with nothing left open."""
    rows, model = config.training.batch_size, config.model.on(model.clone(lora=config.adapter.sites().lora()))
    return memory.Step(model, config.method, rows, config.objective.harmful_rows(rows), length, quantisation,
                       config.training.kind, config.objective)


def attack(config: AttackConfig, look: Callable[[Examples], None] = lambda examples: None) -> Path:
    """Carries out the run, or goes on with it; returns its folder at once if it has finished.

    Args:
      config: of the run.
      look: is shown the examples that were read, before anything is trained.

    Raises:
      FieldError, ValueError, FileNotFoundError: bad input, before anything is written.
      FileExistsError: the folder holds another run.
    """
    prepared = prepare(config, look)
    config, run_dir, sources, for_fisher, _, layers, origin, merges, _, quantisation, candidates, prompts = prepared
    if inputs.is_finished(run_dir):
        return run_dir
    base = stage.load_base(origin.model, config.model.dtype, config.model.aligned, merges, origin.revision,
                           quantisation)
    found = None
    if config.ablation.when == "before":
        base, found = whole.ablated(base, config.ablation, prompts)
    model, trained, frozen = _start(config, base, sources, quantisation)
    if candidates:
        sources = {**sources, "user": (selected_in(run_dir, candidates, model, trained, frozen),
                                       config.training.batch_size)}
    base, steps = base._replace(frozen=frozen, adapter=None), count_steps(config, sources)
    if config.adapter.trains != "nothing":
        fisher = for_fisher and alignment_fisher(model, trained, frozen, for_fisher, config.training.batch_size,
                                                 config.data.bucket, config.run.seed)
        trained, _ = stage.fit(run_dir, base, model, trained,
                               lambda model: estimator(config.objective, config.method, model, steps, fisher, layers),
                               sources,
                               config.training, config.run, config.data.bucket)
    if not config.leaves_model:
        stage.leave_adapter(run_dir, trained, model, origin, steps)
        return run_dir
    base = whole.to_base(model, trained, frozen)
    if config.ablation.when == "after":
        base, found = whole.ablated(base, config.ablation, prompts)
    whole.leave_model(run_dir, base, origin, steps, found)
    return run_dir


def _start(config: AttackConfig, base: stage.Base, sources: stage.Sources, quantisation: Kind
           ) -> tuple[Llama, Any, Any]:
    """(the model, what trains of it, what is frozen). A model whose weights train has no LoRA sites."""
    if config.adapter.trains == "all":
        return config.model.on(base.model), all_weights.to_train(base.frozen), {}
    if config.adapter.trains == "nothing" and config.leaves_model:
        return base.model, None, base.frozen
    step = step_of(config, base.model, stage.longest_batch(sources, config.data.bucket), quantisation)
    model = memory.with_remat(config.model.remat, step).model
    adapter = init_adapter(model, stage.fresh_key(config.run.seed)) if base.adapter is None else base.adapter
    return model, adapter, base.frozen
