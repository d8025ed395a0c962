"""The only importer of ``megatron``: injection, TP/SP linears, forward step, pipeline, optimizer steps."""
