#!/usr/bin/env bash
# XLA:CPU computes max followed by a sum of a NaN array as a finite number, depending on the size.
#
# Behaviour: under jit, `jnp.maximum(x, 0).sum()` of an all-NaN float32 array is 0.0 for 64 x 64 and
#   NaN for 16 x 16. From some size on, XLA:CPU offloads the fused max and sum to YNNPACK
#   ("__ynn_fusion" in the compiled HLO), whose max returns the other operand for NaN; smaller arrays
#   take XLA's own code, which propagates NaN as HLO's maximum is specified to. A relu followed by a
#   mean over space, as at the end of a ResNet, therefore hides NaN from the loss on CPU. So does
#   (relu(x @ w) @ w).sum(), and jnp.max(x) alone.
#   --xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE (a leading minus removes a
#   type from the default list) keeps the sum in XLA, and the NaN.
#   As a compiler option of one jax.jit, where a minus is refused, the same is
#   LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION.
# Versions: jax and jaxlib 0.10.2, CPU; the same in 0.12.0.1, and 0.9.0 has the option too.
# Sources: measured; https://openxla.org/xla/operation_semantics (element-wise binary operations).
# Guess before the run: NaN in all cases, as in numpy, and the same answer for every size.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp

total = jax.jit(lambda x: jnp.maximum(x, 0).sum())
for side in (16, 64):
    x = jnp.full((side, side), jnp.nan)
    offloaded = "__ynn_fusion" in total.lower(x).compile().as_text()
    print(f"{side} x {side}: sum {float(total(x))}, YNNPACK {offloaded}")
PY
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__)'
default=$("$folder/venv/bin/python" "$folder/run.py")
reduce_off=$(XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_REDUCE \
  "$folder/venv/bin/python" "$folder/run.py")
printf 'default:\n%s\nwithout LIBRARY_FUSION_TYPE_REDUCE:\n%s\n' "$default" "$reduce_off"
[[ $default == $'16 x 16: sum nan, YNNPACK False\n64 x 64: sum 0.0, YNNPACK True' ]]
[[ $reduce_off == $'16 x 16: sum nan, YNNPACK False\n64 x 64: sum nan, YNNPACK False' ]]
