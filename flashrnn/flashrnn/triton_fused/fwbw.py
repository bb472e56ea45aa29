"""``flashrnn.flashrnn.triton_fused.fwbw``: upstream's scans with its backend ``triton_fused``."""

from flashrnn.compat.names import fwbw

lstm_tr_fwbw = fwbw("lstm", "triton")
slstm_tr_fwbw = fwbw("slstm", "triton")
