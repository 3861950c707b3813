"""digits: images of handwritten digits, drawn by a small diffusion model, with a known reward.

The images are scikit-learn's `load_digits`, 1,797 of 8 x 8 pixels, which come with that package
(`pip install 'qstar_jax[diffusion]'`). The model is a class-conditional MLP, the reward is ink on a digit that can be
read.
"""

from qstar_jax.tasks.digits.denoiser import conditioned as conditioned
from qstar_jax.tasks.digits.denoiser import init_denoiser as init_denoiser
from qstar_jax.tasks.digits.denoiser import one_hot as one_hot
from qstar_jax.tasks.digits.denoiser import predict_noise as predict_noise
from qstar_jax.tasks.digits.images import PIXELS as PIXELS
from qstar_jax.tasks.digits.images import SIDE as SIDE
from qstar_jax.tasks.digits.images import Digits as Digits
from qstar_jax.tasks.digits.images import load_images as load_images
from qstar_jax.tasks.digits.reward import Readers as Readers
from qstar_jax.tasks.digits.reward import ink as ink
from qstar_jax.tasks.digits.reward import true_reward as true_reward
