"""The commands of ``hf-elastic``, by what they are about; ``hf_elastic/cli.py`` puts them together."""
