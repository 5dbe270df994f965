"""Configs as frozen dataclasses in typed parts, and their flat form, in which flags, recipes and config.json have them.

A stage's config is made of parts (model, data, training, …). A part's fields say in one place what a command line
shows: default, help, bounds. A field made by `choice` holds one of several dataclasses, by name: a method's own
settings. Names are unique within a stage, so that a config is also a flat mapping {name: value}: `make` builds one from
it, `flat` gives it back."""

import contextlib
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

Config = TypeVar("Config")


class FieldError(ValueError):
    """A field of a config that is not valid: "name: found …, expected …"."""

    def __init__(self, name: str, message: str):
        super().__init__(f"{name}: {message}")
        self.name, self.message = name, message


def field(default: Any, help: str, *, at_least: float | None = None, above: float | None = None,
          below: float | None = None, name: str | None = None) -> Any:
    """A field with its help text and bounds; `name` is its flat name, where that is not the field's own."""
    return dataclasses.field(default=default, metadata={
        "help": help, "at_least": at_least, "above": above, "below": below, **({"name": name} if name else {})})


def choice(name: str, options: Mapping[str, type], default: str, help: str) -> Any:
    """A field that holds an instance of one of these dataclasses; `name` is the flat name of which one."""
    return dataclasses.field(default_factory=options[default], metadata={
        "help": help, "choice": name, "options": options, "default": default})


def flat_name(f: dataclasses.Field) -> str:
    return f.metadata.get("name", f.name)


def require(holds: bool, name: str, found: Any, expected: str) -> None:
    """Raises FieldError unless it holds."""
    if not holds:
        raise FieldError(name, f"found {found!r}, expected {expected}")


def check_bounds(part: Any) -> None:
    """Raises FieldError for the first field of a part that is outside of its bounds or not among its literals."""
    hints = _hints(type(part))
    for f in dataclasses.fields(part):
        value, bounds = getattr(part, f.name), f.metadata
        if value is None or "help" not in bounds or "choice" in bounds:
            continue
        options = typing.get_args(hints[f.name]) if typing.get_origin(hints[f.name]) is typing.Literal else ()
        require(not options or value in options, flat_name(f), value, "one of " + ", ".join(map(str, options)))
        least, above, below = bounds["at_least"], bounds["above"], bounds["below"]
        require(least is None or value >= least, flat_name(f), value, f"at least {least}")
        require(above is None or value > above, flat_name(f), value, f"more than {above}")
        require(below is None or value < below, flat_name(f), value, f"less than {below}")


@contextlib.contextmanager
def library_errors(part: Any, renamed: Mapping[str, str] = types.MappingProxyType({})) -> Iterator[None]:
    """What the library refuses by a parameter's name ("lisa: rho: found …", "LoraConfig.rank: found …") is a FieldError
    of the part's field. renamed: {parameter: field}, where they differ."""
    try:
        yield
    except FieldError:
        raise
    except ValueError as error:
        said = re.fullmatch(r"\w+(?:: |\.)(\w+): (.*)", str(error), re.DOTALL)
        by_name = {f.name: flat_name(f) for f in dataclasses.fields(part)}
        if said is None or (name := renamed.get(said[1], said[1])) not in by_name:
            raise
        raise FieldError(by_name[name], said[2]) from error


class Part:
    """A part of a config: its bounds are checked when it is made."""

    def __post_init__(self):
        check_bounds(self)


@functools.cache
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


class Setting(NamedTuple):
    """One flat name of a config class."""

    name: str
    hint: Any  # its type: str, int, float, bool, Literal[...] or tuple[str, ...]; X for X | None
    default: Any
    help: str
    group: str  # the part's title, the first line of its docstring
    option: str | None  # which choice reads it ("booster"), None for what every config of the class has
    optional: bool = False  # may be None


def settings(config_class: type, option: str | None = None) -> Iterator[Setting]:
    """All flat names of a config class, those of every choice too: a name that several choices read comes several
    times.

    option: of which choice the class is, None for a whole config or a part of one.
    """
    title = (config_class.__doc__ or "").strip().split("\n")[0].rstrip(".")
    for f in dataclasses.fields(config_class):
        hint = _hints(config_class)[f.name]
        if "choice" in f.metadata:
            options = f.metadata["options"]
            yield Setting(f.metadata["choice"], typing.Literal[tuple(options)], f.metadata["default"],
                          f.metadata["help"], title if option else "Method", option)
            if not option:  # a base's settings are those of the method itself
                for name, part in options.items():
                    yield from settings(part, name)
        elif dataclasses.is_dataclass(hint):
            yield from settings(hint, option)
        else:
            optional = isinstance(hint, types.UnionType)
            if optional:
                hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
            yield Setting(flat_name(f), hint, f.default, f.metadata["help"], title, option, optional)


@functools.cache
def names(config_class: type) -> frozenset[str]:
    """All flat names of a config class, whatever is chosen."""
    return frozenset(setting.name for setting in settings(config_class))


def make(config_class: type[Config], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Config:
    """The config of flat values.

    Args:
      config_class: of a stage, or a part.
      given: {name: value}; each must be read.
      defaults: what stands for names that are not given, such as a recipe; may have more than is read.

    Raises:
      FieldError: a value that the config refuses, an unknown name, or one that the chosen method does not read.
    """
    config = _make(config_class, {**(defaults or {}), **given})
    read = flat(config)
    for name, value in given.items():
        if name not in names(config_class):
            raise FieldError(name, f"found {value!r}, expected no such field")
        if name not in read:
            chosen = ", ".join(f"{of}={read[of]}" for of in _choices(config_class, name) if of in read)
            raise FieldError(name, f"found {value!r}, expected nothing: {chosen} does not read it")
    return config


def _choices(config_class: type, name: str) -> Iterator[str]:
    """The flat names that choose a method, and what the method builds on, where some choice reads `name`."""
    for f in dataclasses.fields(config_class):
        if "choice" in f.metadata and any(name in names(option) for option in f.metadata["options"].values()):
            yield f.metadata["choice"]
            for option in f.metadata["options"].values():
                yield from _choices(option, name)


def _make(config_class: type, values: Mapping[str, Any]) -> Any:
    arguments = {}
    for f in dataclasses.fields(config_class):
        hint = _hints(config_class)[f.name]
        if "choice" in f.metadata:
            name, options = f.metadata["choice"], f.metadata["options"]
            chosen = values.get(name, f.metadata["default"])
            require(chosen in options, name, chosen, "one of " + ", ".join(options))
            arguments[f.name] = _make(options[chosen], values)
        elif dataclasses.is_dataclass(hint):
            arguments[f.name] = _make(hint, values)
        elif flat_name(f) in values:
            value = values[flat_name(f)]
            arguments[f.name] = tuple(value) if isinstance(value, list) else value
    return config_class(**arguments)


def flat(config: Any) -> dict[str, Any]:
    """{name: value} of all that the config reads; `make` gives the config back."""
    return _flat(config, {})


def _flat(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """`flat`, without the settings of a method in whose place `given` chooses another."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if "choice" in f.metadata:
            name, options = f.metadata["choice"], {part: name for name, part in f.metadata["options"].items()}
            values[name] = options[type(value)]
            if given.get(name, values[name]) == values[name]:
                values |= _flat(value, given)
        elif dataclasses.is_dataclass(value):
            values |= _flat(value, given)
        else:
            values[flat_name(f)] = value
    return values


def change(config: Config, **given: Any) -> Config:
    """The config with other flat values. A newly chosen method starts from its own defaults.

    Raises:
      FieldError: as of `make`.
    """
    return make(type(config), given, _flat(config, given))


def parse(config_class: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """Typed values of {name: text}; + stands for the comma between items of a list, and between data sources.

    Raises:
      FieldError: an unknown name, or a text that is no value of its type.
    """
    by_name = {setting.name: setting for setting in settings(config_class)}
    values = {}
    for name, text in texts.items():
        if name not in by_name:
            raise FieldError(name, f"found {text!r}, expected no such field")
        values[name] = _parse(by_name[name], text)
    return values


def _parse(setting: Setting, text: str) -> Any:
    hint = setting.hint
    if typing.get_origin(hint) is typing.Literal:
        require(text in typing.get_args(hint), setting.name, text, "one of " + ", ".join(typing.get_args(hint)))
        return text
    if typing.get_origin(hint) is tuple:
        return tuple(text.split("+"))
    if hint is bool:
        require(text in ("true", "false"), setting.name, text, "true or false")
        return text == "true"
    if hint is str:
        return text.replace("+", ",")
    try:
        return hint(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[hint]
        raise FieldError(setting.name, f"found {text!r}, expected {expected}") from None
