"""Federated fine-tuning of aligned models, some clients of which are harmful: the seeds of one setting together.

Who is harmful, which rows each client has and who takes part in a round are functions of the seed. A client that is
honest in one setting has the same rows in every other with as many clients, rows and the same split."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxvaccine import data, federated, optim
from jaxvaccine.data import clients as splits
from jaxvaccine.experiment import lanes, stage
from jaxvaccine.experiment.attack import aligned_prompts, read_data
from jaxvaccine.experiment.attack_config import AttackTraining
from jaxvaccine.experiment.config import FieldError, Part, field, require
from jaxvaccine.experiment.methods import Undefended
from jaxvaccine.experiment.plans import Settings, cell_configs
from jaxvaccine.experiment.results import Cell
from jaxvaccine.llama import Llama

FEDPROX, PROXIMAL = "fedprox", "mu"
MU = 0.1  # of fedprox without one


@dataclasses.dataclass(frozen=True)
class FederationPart(Part):
    """Federation."""

    clients: int = field(10, "Clients, among which the rows of --attack_n are split.", at_least=1)
    participation: float = field(1.0, "Part of the clients that is drawn for a round.", above=0)
    rounds: int = field(20, "Rounds.", at_least=1)
    local_steps: int = field(5, "Steps of a client in a round, of --attack_batch_size rows, by an optimizer that "
                                "starts anew.", at_least=1)
    client_weights: federated.Weights = field(
        "rows", "Of fedavg, fedprox and clipped_mean: a client counts by its rows, or as the others.")
    client_sizes: Literal["equal", "unequal"] = field(
        "equal", "Rows of clients: as many each, or in proportion to 1, 2, 3, …")
    server_learning_rate: float = field(1.0, "By which the joined update is multiplied.", at_least=0)
    harmful_rows: float = field(1.0, "Part of a harmful client's rows that is harmful.", above=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("participation", "harmful_rows"):
            require(getattr(self, name) <= 1, name, getattr(self, name), "at most 1")
        self.whole("participation", self.participation)
        require(self.server_learning_rate < float("inf"), "server_learning_rate", self.server_learning_rate,
                "a finite number")

    def whole(self, name: str, part: float) -> int:
        """How many clients a part of them is. Raises FieldError unless that is a whole number."""
        count = round(part * self.clients)
        require(0 <= part <= 1 and abs(count - part * self.clients) < 1e-6, name, part,
                f"a part of {self.clients} clients that is a whole number of them")
        return count

    @property
    def participants(self) -> int:
        return self.whole("participation", self.participation)


class Rule(NamedTuple):
    """How clients are trained and joined."""

    aggregate: federated.Aggregate
    mu: float  # of the proximal term; 0 without one


def parse_rule(text: str, participants: int) -> Rule:
    """The rule of "trimmed_mean:share=0.2": a name of `federated.AGGREGATIONS` with its settings, each with mu of a
    proximal term if it likes; fedprox is fedavg with one.

    Raises:
      FieldError: no rule, or not of so many clients.
    """
    name, *items = text.split(":")
    rule = federated.AGGREGATIONS.get("fedavg" if name == FEDPROX else name)
    require(rule is not None, "rules", text, f"one of {', '.join((*federated.AGGREGATIONS, FEDPROX))}")
    values = {PROXIMAL: MU if name == FEDPROX else 0.0}
    known = [*inspect.signature(rule).parameters, PROXIMAL]
    for item in items:
        key, _, value = item.partition("=")
        require(key in known, "rules", text, f"of {name} no other setting than {', '.join(known)}")
        try:
            values[key] = float(value)
        except ValueError:
            raise FieldError("rules", f"found {text!r}, expected a number in the place of {value!r}") from None
    mu = values.pop(PROXIMAL)
    require(0 <= mu < float("inf"), "rules", text, "mu of at least 0")
    try:
        aggregate = rule(**values)
        # Traced, for what a rule says of so few clients.
        jax.eval_shape(aggregate, *(jax.ShapeDtypeStruct(shape, np.float32)
                                    for shape in ((participants, 1), (participants,))))
    except ValueError as error:
        raise FieldError("rules", f"found {text!r}: {error}") from error
    return Rule(aggregate, mu)


def check_split(text: str) -> None:
    """Raises FieldError unless it is a split."""
    try:
        splits.parse_split(text)
    except ValueError as error:
        raise FieldError("splits", str(error).removeprefix("split: ")) from error


class Setting(NamedTuple):
    """What a cell of a study stands for."""

    harmful_clients: str  # part of the clients, as written
    split: str
    rule: str

    @property
    def text(self) -> str:
        """In the place of an attack's."""
        return f"harmful_clients={self.harmful_clients}:split={self.split}:rule={self.rule}"


def harmful_counts(part: FederationPart, n: int, harmful_clients: float, seed: int) -> np.ndarray:
    """[clients] int, how many rows of every client are harmful. More harmful clients are those of fewer, and others."""
    order = np.random.default_rng([seed, 4]).permutation(part.clients)
    chosen = order[:part.whole("harmful_clients", harmful_clients)]
    found = np.zeros(part.clients, int)
    found[chosen] = np.floor(sizes_of(part, n)[chosen] * part.harmful_rows + 0.5)
    require(bool((found[chosen] > 0).all()), "harmful_rows", part.harmful_rows,
            f"so many that each harmful client has one, of the fewest rows {sizes_of(part, n).min()}")
    return found


def sizes_of(part: FederationPart, n: int) -> np.ndarray:
    """[clients] int, how many of n rows each has."""
    try:
        return splits.client_sizes(n, part.clients, part.client_sizes)
    except ValueError as error:
        raise FieldError("attack_n", str(error).removeprefix("n: ")) from error


def attack_text(harmful: int, n: int) -> str:
    """The attack of a plan that reads so many harmful rows of n."""
    return f"poison_ratio={harmful / n!r}"


def client_rows(settings: Settings, cell: Cell, setting: Setting, part: FederationPart,
                prompts: Mapping[str, Sequence[str]], tokenizer: Any) -> list[list[data.Example]]:
    """Every client's rows, of the cell's seed: its own benign ones, in harmful clients some of them replaced.

    prompts: of the alignment, which harmful rows may not share.

    Raises:
      FieldError, ValueError: as of `attack.read_data`; too few rows; or as of `splits.split_rows`.
    """
    def read(harmful: int):
        _, config = cell_configs(settings, Path("-"), cell._replace(attack=attack_text(harmful, n)))
        _, poisoned = read_data(config, cell.seed, aligned_prompts(prompts), tokenizer)
        of = [e for e, bad in zip(poisoned.examples, poisoned.is_harmful, strict=True) if bad == bool(harmful)]
        require(len(of) == (harmful or n), "attack_harmful_data" if harmful else "attack_user_data", len(of),
                f"{harmful or n} rows that can be trained on")
        return of

    _, config = cell_configs(settings, Path("-"), cell._replace(attack=attack_text(0, 1)))
    n = config.data.n
    counts = harmful_counts(part, n, float(setting.harmful_clients), cell.seed)
    benign = read(0)
    try:
        chosen = splits.split_rows([e.output for e in benign], sizes_of(part, n), setting.split, cell.seed)
    except ValueError as error:
        raise FieldError("splits", str(error)) from error
    bad = iter(read(int(counts.sum())) if counts.any() else ())
    # The whole piece is drawn first, so that it is the same whoever is harmful.
    return [[next(bad) if place < count else benign[i] for place, i in enumerate(rows)]
            for rows, count in zip(chosen, counts, strict=True)]


@functools.lru_cache(maxsize=64)
def _compiled(model: Llama, kind: optim.Kind, decay: float | None, clip: float | None, rule: str, participants: int,
              server_learning_rate: float) -> Callable:
    aggregate, mu = parse_rule(rule, participants)
    client = Undefended().make(model, 1, None)
    return federated.make_round(
        federated.proximal(client, mu) if mu else client,
        lambda rate: optim.layer_masked_step(kind, optim.Scalars(rate, decay, clip)), aggregate,
        server_learning_rate=server_learning_rate, over=lanes.over_lanes)


class Run(NamedTuple):
    """One seed's federation: what its rounds read."""

    rows: list[data.TokenizedExamples]  # [clients]
    harmful: np.ndarray  # [clients] bool
    seed: int


# (rounds done, lanes with the server's adapter, {measure: [seeds]} of the round that was the last).
Observe = Callable[[int, lanes.Lanes, dict[str, np.ndarray]], None]


def train(start: lanes.Lanes, runs: Sequence[Run], rule: str, part: FederationPart, training: AttackTraining,
          bucket: int, observe: Observe, progress: bool = False, description: str = "") -> None:
    """Trains every lane's adapter by a federation of its own.

    The learning rate's schedule goes over the local steps of all rounds; a client goes on through its rows where it
    stopped when it took part last.

    Args:
      start: aligned lanes, one per run.
      runs: of each lane.
      rule: as of `parse_rule`.
      part, training: of the federation and of a client.
      bucket: multiple, in tokens, to which rows are padded, all to the longest.
      observe: called after every round.
      progress: shows a bar, with `description`, of the rounds.

    Raises:
      FloatingPointError: the loss of a client is not finite.
    """
    from tqdm import tqdm

    config = training.optimizer()
    numbers = optim.scalars(config, part.rounds * part.local_steps)
    step = _compiled(start.model, config.kind, numbers.weight_decay, numbers.clip_norm, rule, part.participants,
                     part.server_learning_rate)
    rates = np.asarray(numbers.learning_rate).reshape(part.rounds, part.local_steps)
    length = data.bucket_length(max(len(ids) for run in runs for rows in run.rows for ids in rows.input_ids), bucket)
    federations = [_Federation(run, part, training.batch_size, length) for run in runs]
    of_lanes = [start.trained(i) for i in range(len(runs))]
    servers = [federated.start(adapter) for adapter, _ in of_lanes]
    for number in tqdm(range(part.rounds), desc=description, unit="round", disable=not progress, dynamic_ncols=True):
        rounds, measured = [], []
        # All of them before the first is read: a lane's batches are made while another's are computed.
        for i, of in enumerate(federations):
            clients = of.clients(number)
            servers[i], metrics = step(servers[i], of_lanes[i][1], clients, rates[number], of.key)
            rounds.append((of, clients, metrics))
        for of, clients, metrics in rounds:
            measured.append(_measures(metrics, of.run.harmful[clients.ids]))
            if not np.isfinite(np.asarray(metrics["loss"])).all():
                raise FloatingPointError(f"loss: found values that are not finite in round {number} of seed "
                                         f"{of.run.seed} with {rule}, expected finite numbers")
        observe(number + 1, start._replace(adapters=lanes.stack([server.adapter for server in servers])),
                {name: np.array([of[name] for of in measured]) for name in measured[0]})


def _measures(metrics: Mapping[str, Any], harmful: np.ndarray) -> dict[str, float]:
    """Of a round: how many harmful clients took part, and how long updates were; NaN of none."""
    lengths = np.asarray(metrics["update_norm"])
    return {"harmful_participants": float(harmful.sum()),
            "update_norm_harmful": float(lengths[harmful].mean()) if harmful.any() else float("nan"),
            "update_norm_others": float(lengths[~harmful].mean()) if (~harmful).any() else float("nan"),
            "server_update_norm": float(metrics["server_update_norm"])}


class _Federation:
    """One run's clients, round after round."""

    def __init__(self, run: Run, part: FederationPart, batch_size: int, length: int):
        self.run, self.part = run, part
        self.key = stage.training_key(run.seed)
        self._drawn = jax.random.key(data.batching.stream_seed(run.seed, "clients") % 2**32)
        steps = part.rounds * part.local_steps
        self._streams = [data.training_batches(
            {"user": (rows, batch_size)}, data.batching.stream_seed(run.seed, f"client {i}"),
            lengths={"user": np.full(steps, length)}) for i, rows in enumerate(run.rows)]
        self._done = np.zeros(part.clients, int)
        self._weights = federated.client_weights([len(rows.input_ids) for rows in run.rows], part.client_weights)

    def clients(self, number: int) -> federated.Clients:
        """Those of a round, which are asked for in their order."""
        ids = np.asarray(federated.sample_clients(self._drawn, number, self.part.clients, self.part.participants))
        batches = [[self._streams[i](int(self._done[i]) + k) for k in range(self.part.local_steps)] for i in ids]
        self._done[ids] += self.part.local_steps
        stacked = [jax.tree.map(lambda *of: np.stack(of), *of_client) for of_client in batches]
        return federated.Clients(ids, self._weights[ids], jax.tree.map(lambda *of: np.stack(of), *stacked))
