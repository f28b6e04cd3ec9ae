"""Colours and markers of providers in plots."""

# Okabe and Ito's colours, told apart by colour-blind readers too; the shapes tell them apart in
# black and white.
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
