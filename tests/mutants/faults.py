"""All planted faults. A new part of the library brings a module of its own, named here.

The bug classes are those that speculative decoders are known to have had.
"""

from mutants.fault import Fault
from mutants.faults_bench import BENCH
from mutants.faults_call import CALL
from mutants.faults_chain import CHAIN
from mutants.faults_cli import CLI
from mutants.faults_data import DATA
from mutants.faults_drafters import DRAFTERS
from mutants.faults_files import FILES
from mutants.faults_foreign import FOREIGN
from mutants.faults_fuzz import FUZZ
from mutants.faults_heads import HEADS
from mutants.faults_kernels import KERNELS
from mutants.faults_live import LIVE
from mutants.faults_rejection import REJECTION
from mutants.faults_round import ROUND
from mutants.faults_seam import SEAM
from mutants.faults_speed import SPEED
from mutants.faults_target import TARGET

FAULTS: tuple[Fault, ...] = (
    *ROUND, *TARGET, *CALL, *DRAFTERS, *CHAIN, *REJECTION, *HEADS, *BENCH,
    *CLI, *DATA, *FILES, *FOREIGN, *FUZZ, *KERNELS, *LIVE, *SPEED, *SEAM,
)  # fmt: skip
