"""Draft heads: small modules that draft from the target's own hidden states."""
