"""NVIDIA's instructions by the part of a multiprocessor that executes them.

Sources: the names are those of "Instruction Set Reference" in NVIDIA's CUDA Binary Utilities (Ampere,
Hopper, Blackwell); what executes them follows "Pipelines" in the Kernel Profiling Guide of Nsight Compute
and the table of arithmetic throughput in the CUDA C++ Programming Guide: conversions between integers and
floats, and between widths, share the unit of the transcendental functions, but I2FP and F2FP, which are
integer instructions.
"""

from __future__ import annotations

from collections.abc import Mapping

# The class of an instruction that stands in none of these is OTHER.
OTHER = "other"
OPCODES = {
    "fma": """
        FADD FADD2 FADD32I FFMA FFMA2 FFMA32I FMUL FMUL2 FMUL32I FCHK FSWZADD
        HADD2 HADD2_32I HFMA2 HFMA2_32I HMUL2 HMUL2_32I
        DADD DFMA DMUL DMNMX DSETP
        UFADD UFFMA UFMUL
    """,
    "mufu": "MUFU F2F F2I I2F I2I FRND POPC FLO BREV UFLO UPOPC UBREV UF2F UF2I UI2F",
    "integer": """
        IABS IADD IADD2 IADD3 IADD32I IDP IDP4A IMAD IMAD32I IMNMX IMUL IMUL32I ISCADD ISETP LEA LOP LOP3
        LOP32I SHF SHL SHR VABSDIFF VABSDIFF4 VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3 BMSK SGXT
        F2FP I2FP I2IP FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2
        MOV MOV32I MOVM PRMT SEL CS2R P2R R2P PLOP3 PSETP REDUX CREDUX
        UBMSK UF2FP UFMNMX UFSEL UFSET UFSETP UI2FP UIABS UIADD3 UIMAD UIMNMX UISETP ULEA ULOP ULOP3
        ULOP32I UMOV UPLOP3 UPRMT UPSETP USEL USGXT USHF USHL USHR UVIADD UVIADDMNMX UVIMNMX UVIMNMX3
        UP2UR UR2UP R2UR
    """,
    "memory": """
        LD LDC LDCU LDG LDGSTS LDL LDS LDSM LDTM LDT ULDC QSPC
        ST STG STL STS STSM STTM STAS STT
        ATOM ATOMG ATOMS RED REDG REDAS SHFL MATCH
        UTMALDG UTMASTG UTMAPF UTMAREDG UTMACCTL UTMACMDFLUSH UBLKCP UBLKPF UBLKRED UTCCP UTCSHIFT
        UTCATOMSWS CCTL CCTLL CCTLT
    """,
    "tensor": """
        BMMA DMMA HMMA IMMA OMMA QMMA
        BGMMA HGMMA IGMMA QGMMA
        UTCHMMA UTCIMMA UTCOMMA UTCQMMA UTCMXQMMA
    """,
    "control": """
        BAR BMOV BPT BRA BREAK BRX BRXU BSSY BSYNC CALL CGAERRBAR EXIT JMP JMX JMXU KILL LEPC NANOSLEEP NOP
        RET RPCMOV WARPSYNC YIELD PREEXIT ELECT VOTE VOTEU B2R R2B S2R S2UR SETCTAID SETLMEMBASE GETLMEMBASE
        DEPBAR LDGDEPBAR LDTM_DEPBAR ERRBAR MEMBAR FENCE SYNCS ACQBULK ACQSHMINIT ARRIVES UCGABAR_ARV
        UCGABAR_WAIT UTCBAR UVIRTCOUNT WARPGROUP WARPGROUPSET ENDCOLLECTIVE USETMAXREG USETSHMSZ PMTRIG
    """,
}
CLASSES = (*OPCODES, OTHER)
_CLASS_OF = {opcode: name for name, opcodes in OPCODES.items() for opcode in opcodes.split()}


def by_class(opcodes: Mapping[str, float]) -> dict[str, float]:
    """Counts of instructions, added up by class; a class for each of ``CLASSES``."""
    counts = dict.fromkeys(CLASSES, 0.0)
    for opcode, count in opcodes.items():
        counts[_CLASS_OF.get(opcode, OTHER)] += count
    return counts
