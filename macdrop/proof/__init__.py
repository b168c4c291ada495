"""Proofs that a model depends on its massive weights: perplexity by block of text, under each attack."""

from macdrop.proof.factors import Factor as Factor
from macdrop.proof.layers import LayerProof as LayerProof
from macdrop.proof.layers import LayerRow as LayerRow
from macdrop.proof.layers import layer_seconds as layer_seconds
from macdrop.proof.layers import prove_layers as prove_layers
from macdrop.proof.losses import block_losses as block_losses
from macdrop.proof.losses import perplexity as perplexity
from macdrop.proof.losses import text_blocks as text_blocks
from macdrop.proof.proving import Proof as Proof
from macdrop.proof.proving import prove as prove
from macdrop.proof.proving import require_blocks as require_blocks
