"""Hidden states of a reference, with its output head, for a loss that takes no whole logits."""

from collections.abc import Callable

from torch import Tensor

from lightning_replay.head_chunks import LinearHead
from lightning_replay.models.head import HiddenStates, OutputHeads
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.references.models import ReferenceModel

__all__ = ["reference_hidden"]


def reference_hidden(
    heads: OutputHeads, reference: ReferenceModel, model: LanguageModel, call: Callable[[LanguageModel], Tensor]
) -> HiddenStates | None:
    """Call the reference and keep hidden states and head, without a graph, for when the model is called.

    The reference is called first: what is left of it then is smaller than the model's graph.

    Args:
        heads: The heads found so far.
        reference: The reference.
        model: The model that trains.
        call: Calls the model that it is given, and returns its logits.

    Returns:
        None if whole logits are to be taken.
    """
    with reference.active() as active:

        def keep(given: HiddenStates) -> HiddenStates | None:
            # A layer with an adapter is another one when the adapter is switched on again.
            lasts = isinstance(given.head, LinearHead) or active.module is not model.module
            return given.kept(copy=not (reference.weights_stay and lasts))

        return heads.run(active, call, keep)
