"""What a model answered, and how it scores texts: small records that show themselves in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass

from qstar_jax.decoding.decoder import Generation
from qstar_jax.evaluation.scored import ScoredResponse
from qstar_jax.report.embedded import answers_table, framed
from qstar_jax.report.page import heatmap_page
from qstar_jax.report.terminal import print_heatmaps


@dataclass(frozen=True)
class Answers(Sequence[tuple[Generation, ...]]):
    """Responses to prompts. `answers[i]` are those to prompt i, best first; in a notebook, a table.

    Attributes:
        prompts: Each prompt as the model reads it.
        generations: The responses to each, best first.
    """

    prompts: tuple[str, ...]
    generations: tuple[tuple[Generation, ...], ...]

    @property
    def texts(self) -> list[str]:
        """The text of the best response to each prompt."""
        return [several[0].text for several in self.generations]

    def __getitem__(self, index):
        return self.generations[index]

    def __len__(self) -> int:
        return len(self.generations)

    def _repr_html_(self) -> str:
        return answers_table(self.prompts, self.generations)


@dataclass(frozen=True)
class Scores(Sequence[ScoredResponse]):
    """Responses to one prompt with the numbers of each token; in a notebook, a heatmap of their rewards.

    Attributes:
        responses: One record each, in the order in which they were given.
    """

    responses: tuple[ScoredResponse, ...]

    def __getitem__(self, index):
        return self.responses[index]

    def __len__(self) -> int:
        return len(self.responses)

    def __repr__(self) -> str:
        return "\n".join(["Scores of", *(f"  {response!r}" for response in self.responses)])

    def show(self) -> None:
        """Prints the responses on the terminal, each token on the colour of its reward."""
        print_heatmaps(self.responses)

    def to_html(self, title: str = "Token rewards") -> str:
        """Draws the heatmap as a whole page that needs nothing else."""
        return heatmap_page(self.responses, title)

    def _repr_html_(self) -> str:
        return framed(self.to_html())
