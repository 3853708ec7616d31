"""What each thread of an OpenMP team runs: its shares of a kernel's calls."""

from storm_vlm.ops._cpu_vector import call_integer, call_kernel, integer


def run_team(team: int) -> None:
    """Runs this thread's shares; a team may have fewer threads than it was asked for.

    At the address lie, as 64-bit integers: the addresses of the kernel and of OpenMP's functions for the number of threads
    and of this thread; the number of shares; where each share's calls begin, and where the last one's end; the
    calls, five integers each.
    """
    kernel, num_shares = integer(team), integer(team + 24)
    bounds = team + 32
    calls = bounds + 8 * (num_shares + 1)
    num_threads, share = call_integer(integer(team + 8)), call_integer(integer(team + 16))
    while share < num_shares:
        for i in range(integer(bounds + 8 * share), integer(bounds + 8 * share + 8)):
            a = calls + 40 * i
            call_kernel(kernel, integer(a), integer(a + 8), integer(a + 16), integer(a + 24), integer(a + 32))
        share += num_threads
