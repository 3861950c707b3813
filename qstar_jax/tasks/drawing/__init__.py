"""drawing: a refiner says what to draw, a painter draws it, and preferences are between images only (Appendix D).

A prompt asks for a kind of digit and an ink ("draw something odd bold"). The refiner, a small decoder, answers with a
request ("seven bold"); the painter, the denoiser of `tasks.digits`, draws it. Both references have planted faults, so
that the cause of every bad image is known.
"""

from qstar_jax.tasks.drawing.judging import Judges as Judges
from qstar_jax.tasks.drawing.painter import Painter as Painter
from qstar_jax.tasks.drawing.painter import fit_painter as fit_painter
from qstar_jax.tasks.drawing.painter import make_schedule as make_schedule
from qstar_jax.tasks.drawing.pairs import Pairs as Pairs
from qstar_jax.tasks.drawing.pairs import draw_pairs as draw_pairs
from qstar_jax.tasks.drawing.refiner import Refiner as Refiner
from qstar_jax.tasks.drawing.refiner import fit_refiner as fit_refiner
from qstar_jax.tasks.drawing.refiner import make_model as make_model
