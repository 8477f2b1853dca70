"""Let torchvision be imported beside a torch that was built without its operators. Written by hand, as `__main__` is.

timm and lightning import torchvision; beside a processor-only torch it dies with `operator torchvision::nms does not exist`.
Declaring the two operators mends that; their implementations are never called here. They are declared only where the import
has failed: beside a torch that fits, torchvision brings them itself, and would find them taken. Not done in the package's
`__init__`, for then every `import intel_nb` would pay for torch.
"""


def allow() -> None:
    "Make torchvision importable; call this before the first import of timm or lightning."
    import torch
    try:
        import torchvision  # noqa: F401
    except RuntimeError as e:
        if "torchvision::nms" not in str(e):
            raise
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
