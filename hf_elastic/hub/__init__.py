"""The Hugging Face Hub: model cards made from records, and pushes that are one commit or nothing."""
