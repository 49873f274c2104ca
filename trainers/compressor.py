"""SemanticGen's compressor: from a vision encoder's features to a small, whitened Gaussian space.

Shapes: B samples, S semantic frames, V U their lines and columns, W width of the features, K
channels of the compressed space, N = S V U.

Source: SemanticGen (arXiv 2512.20619), section 3.2, "semantic representation compression".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOG_VARIANCE = (-30.0, 20.0)
"""Of the posterior; beyond it float32 has nothing left."""


class SemanticCompressor(nn.Module):
    """An MLP to the mean and log-variance of a Gaussian, and the whitening of what is drawn.

    Always in float32.

    Args:
        width: W.
        channels: K; None keeps the features as they are (the paper's ablation): no MLP, no
            variance, and channels are whitened each by itself.
    """

    def __init__(self, width: int, channels: int | None):
        super().__init__()
        self.layers = None
        if channels is not None:
            self.layers = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2 * channels),
            )
        self.whitening = Whitening(channels or width, together=channels is not None)

    def moments(self, features_BSVUW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance (B, S, V, U, K); no variance where nothing is compressed."""
        with torch.autocast(features_BSVUW.device.type, enabled=False):
            if self.layers is None:
                return features_BSVUW.float(), None
            mean, log_variance = self.layers(features_BSVUW.float()).chunk(2, -1)
            return mean, log_variance.clamp(*LOG_VARIANCE)


def drawn_from(mean: Tensor, log_variance: Tensor | None, normal: Tensor) -> Tensor:
    """A sample of the posterior."""
    return mean if log_variance is None else mean + (0.5 * log_variance).exp() * normal


def kl_to_normal(mean: Tensor, log_variance: Tensor | None) -> Tensor:
    """KL divergence of the posterior from the standard normal, mean over N and K, in nats (B,).

    Source: Kingma and Welling 2014, arXiv 1312.6114, appendix B.
    """
    if log_variance is None:
        return mean.new_zeros(len(mean))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return kl.flatten(1).mean(1)


class Whitening(nn.Module):
    """An affine map after which embeddings have mean 0 and unit covariance: u = L z - b.

    b and the lower triangular L are parameters that are fitted by maximum likelihood beside the
    training, L as the Cholesky factor of a Gaussian's precision: so they are resumed, averaged and
    shared among workers as everything that is trained.

    Args:
        channels: K.
        together: With covariances; else L is diagonal.
    """

    def __init__(self, channels: int, *, together: bool):
        super().__init__()
        self.bias_K = nn.Parameter(torch.zeros(channels))
        self.log_scale_K = nn.Parameter(torch.zeros(channels))
        below = channels * (channels - 1) // 2 if together else 0
        self.below_M = nn.Parameter(torch.zeros(below)) if together else None

    def factor(self) -> Tensor:
        """L, (K, K); its diagonal alone (K,) where channels are whitened each by itself."""
        scale_K = self.log_scale_K.exp()
        if self.below_M is None:
            return scale_K
        num = len(scale_K)
        rows, columns = torch.tril_indices(num, num, -1, device=scale_K.device)
        return torch.diag(scale_K).index_put((rows, columns), self.below_M)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Whitened embeddings (..., K), float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, factor = embeddings.float(), self.factor()
            scaled = embeddings * factor if factor.ndim == 1 else embeddings @ factor.T
            return scaled - self.bias_K

    def unlikelihood(self, embeddings: Tensor) -> Tensor:
        """Negative log-likelihood but for a constant, mean over N and K (B,): fits the map."""
        whitened = self(embeddings.detach())
        return 0.5 * whitened.square().flatten(1).mean(1) - self.log_scale_K.mean()
