"""Colours and markers of providers in plots."""

# The colours of Okabe and Ito, which colour-blind readers can distinguish. The marker shapes
# distinguish providers in black and white.
STYLES: dict[str, tuple[str, str]] = {
    "onepass-cpu": ("#0072B2", "o"),
    "onepass-cuda": ("#0072B2", "o"),
    "onepass-triton": ("#56B4E9", "v"),
    "torch-fused": ("#E69F00", "s"),
    "torch-foreach": ("#CC79A7", "D"),
    "torch-fused-fp32": ("#F0E442", "s"),
    "deepspeed-cpu": ("#009E73", "^"),
    "bitsandbytes-8bit": ("#D55E00", "x"),
    "in-place": ("#000000", "|"),
}
