"""What this build of fusee contains, and what the processor has."""

version: str
engines: list[str]
cuda_architectures: list[str]
compiler: str
cuda_compiler: str

def processor_has(engine: str) -> bool:
    """Whether this processor can run the CPU engine of that name."""

def processor_features() -> list[str]:
    """Which of the instruction sets that engines are compiled for this processor has."""
