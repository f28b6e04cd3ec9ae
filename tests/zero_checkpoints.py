"""What ranks check together of checkpoints."""

EVERYWHERE = []
