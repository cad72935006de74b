"""Everything texforce-hub raises on purpose.

::

    TexForceHubError
    ├── RefError          a name cannot be parsed or found
    ├── FileError         a file cannot be read, or is not what it says it is
    ├── DialectError      no layout fits the tensors' names, or one layout's rules are broken
    ├── AdapterError      layers, shapes or values that cannot be an adapter
    ├── MatchError        an adapter does not fit the model it is put on
    ├── FamilyError       a model of another family than needed, or of none that is known
    ├── MergeError        sources, weights or options that cannot be merged
    ├── RecipeError       a recipe that cannot be read or replayed
    ├── PipelineError     a base or a U-Net that cannot be loaded, repaired or saved
    ├── PromptError       a prompt or a prompt file that cannot be used
    ├── RewardError       a reward that cannot be found, or gave something that is no reward
    ├── ConfigError       an option that does not exist or has an impossible value
    ├── TrainingError     a training run that cannot start or go on
    │   └── NotBetterError    a training run that nothing came of
    └── HubError          the Hub said no, or cannot be reached

Each message is one line: what was seen, what was expected, the way out.
"""


def one_line(text: str, most: int = 300) -> str:
    """A stranger's text in a message: one line, control characters and escapes shown as ``\\x1b``, at most so long."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


class TexForceHubError(Exception):
    """The root: catch this to catch every error raised on purpose."""


class RefError(TexForceHubError):
    """A name cannot be parsed, or nothing is found under it."""


class FileError(TexForceHubError):
    """A file cannot be read, or is not what it says it is."""


class DialectError(TexForceHubError):
    """No layout fits the tensors' names, or one layout's rules are broken."""


class AdapterError(TexForceHubError):
    """Layers, shapes or values that cannot be an adapter."""


class MatchError(TexForceHubError):
    """An adapter does not fit the model it is put on."""


class FamilyError(TexForceHubError):
    """A model of another family than needed, or of none that is known."""


class MergeError(TexForceHubError):
    """Sources, weights or options that cannot be merged."""


class RecipeError(TexForceHubError):
    """A recipe that cannot be read or replayed."""


class PipelineError(TexForceHubError):
    """A base or a U-Net that cannot be loaded, repaired or saved."""


class PromptError(TexForceHubError):
    """A prompt or a prompt file that cannot be used."""


class RewardError(TexForceHubError):
    """A reward that cannot be found, or gave something that is no reward."""


class ConfigError(TexForceHubError):
    """An option that does not exist or has an impossible value."""


class TrainingError(TexForceHubError):
    """A training run that cannot start or go on."""


class NotBetterError(TrainingError):
    """A training run in which no step had anything to learn from, or none was better than the beginning."""


class HubError(TexForceHubError):
    """The Hub said no, or cannot be reached."""
