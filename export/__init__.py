"""From a lowered graph to a verified ONNX folder, and ONNX Runtime sessions on it."""

if __name__ != "modcompile.export":
    raise ImportError("import this package as modcompile.export")
