"""The name of `ef21_muon.norms` in earlier versions, which is refused."""

raise ImportError("ef21_muon.lmo has been renamed, import from ef21_muon.norms")
