"""What a quote is: how a code is spelled, how ticks merge, which row is the newest. Pure, no I/O."""
