"""Massive weights of a model: the layer and the rows that bos calls, and those that other tokens and layers have."""

from macdrop.fingerprint import checkpoint_fingerprint as checkpoint_fingerprint
from macdrop.proof import Proof as Proof
from macdrop.proof import prove as prove
from macdrop.proof import text_blocks as text_blocks
from macdrop.scan.find import RULE as RULE
from macdrop.scan.find import choose_bos as choose_bos
from macdrop.scan.find import find_massive_weights as find_massive_weights
from macdrop.scan.find import massive_layer as massive_layer
from macdrop.scan.first_tokens import FirstToken as FirstToken
from macdrop.scan.first_tokens import common_rows as common_rows
from macdrop.scan.first_tokens import first_token_rows as first_token_rows
from macdrop.scan.other_layers import layer_weights as layer_weights
from macdrop.weights import Confidence as Confidence
from macdrop.weights import LayerStats as LayerStats
from macdrop.weights import MassiveWeights as MassiveWeights
