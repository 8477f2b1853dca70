"""Let torchvision be imported beside a torch that was built without its operators. The one module that is written by hand.

timm and lightning import torchvision; beside a processor-only torch it dies with `operator torchvision::nms does not exist`.
Declaring the two operators first mends that; their implementations are never called here. Not done in the package's
`__init__`, for then every `import intel_nb` would pay for torch.
"""


def allow() -> None:
    "Declare torchvision's operators where nothing has; call this before the first import of timm or lightning."
    import torch
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError as e:  # a torchvision with its operators is loaded already
            if "multiple" not in str(e) and "already" not in str(e):
                raise
