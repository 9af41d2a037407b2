"""Fine-tuning with primary component matching (paper section 3.3)."""
