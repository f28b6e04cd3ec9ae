"""The default optimizers of `onepass memory`."""

OPTIMIZERS = "adamw,adamw+bf16,adamw+mx8+split8,adamw8bit,adamw4bit,lion,lion8bit,pagedadamw8bit"
