"""What can go wrong in the pipelines package, all of it something that a user can put right.

PipelineError
|-- RecipeError         a recipe cannot be read, or holds something that is not allowed
|-- SettingError        a --set names no execution setting, or gives it a value that it cannot have
|-- ComparisonError     runs have nothing in common to be compared by
|-- NothingThereError   a command looks for a dataset, cache, run or export that does not exist
|-- FaultsFoundError    what a command was asked to look at is not as it should be
|-- PluginError         another program asks Loupe for something that it does not do
|-- FlowServerError     the flow's server did not start, or went away
"""

__all__ = [
    "ComparisonError",
    "FaultsFoundError",
    "FlowServerError",
    "NothingThereError",
    "PipelineError",
    "PluginError",
    "RecipeError",
    "SettingError",
]


class PipelineError(Exception):
    """Base of every error that the pipelines package raises on purpose."""


class RecipeError(PipelineError, ValueError):
    """A recipe is refused. The message names file, field, what was found and what is allowed."""


class SettingError(PipelineError, ValueError):
    """An execution setting is refused. The message lists the settings."""


class ComparisonError(PipelineError, ValueError):
    """Runs cannot be compared. The message says what they would have to have in common."""


class NothingThereError(PipelineError):
    """What a command should show or use does not exist. The message names the command that makes it."""


class FaultsFoundError(PipelineError):
    """A command that looks at something did, and found faults. The message counts them and says what mends them."""


class PluginError(PipelineError, ValueError):
    """A program that runs Loupe as its plugin asks for something that Loupe does not do. The message says what, and what can be set instead."""


class FlowServerError(PipelineError):
    """The flow's server did not answer in time, or went away during a run."""
