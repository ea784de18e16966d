"""The name of compressors and value formats in earlier versions, which is refused."""

raise ImportError(
    "ef21_muon.messages has been renamed, import from ef21_muon.compressors or ef21_muon.values"
)
