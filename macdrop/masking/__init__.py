"""Sites where a mask meets the model: outputs of frozen linears, PEFT's DoRA norm, stored rows of fused experts.

All three make the forward and backward pass that the paper's edited weights would make. Biases are never masked.
`InputDropout`, for the placebo that drops activations, masks the intermediate state instead. `attacked` zeroes rows.
"""

from macdrop.masking.zeroed import attacked as attacked
