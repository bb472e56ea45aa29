"""``flashrnn.flashrnn.vanilla_fwbw.fwbw``: upstream's scans with its backend ``vanilla_fwbw``."""

from flashrnn.compat.names import fwbw

lstm_pt_fwbw = fwbw("lstm", "vanilla")
slstm_pt_fwbw = fwbw("slstm", "vanilla")
