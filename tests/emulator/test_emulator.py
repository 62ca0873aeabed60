"""The emulator's own tests: what it must compute, count and report.

The programs beside this file are compiled once by the host compiler, against the same headers as
the kernels, and then run case by case. `features` is read by nvcc too, where there is one.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
RUNTIME = ["fiber", "scheduler", "warp", "memory", "counters", "symbols"]
PROGRAMS = {
    "features": ["features", "warps", "tensor", "arithmetic"],
    "faults": ["faults"],
    "traffic": ["traffic"],
}
FLAGS = [
    *(
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fvisibility=hidden",
        "-pthread",
    ),
    *(
        "-DFUSEE_EMULATED",
        "-DFUSEE_ENGINE_NAMESPACE=emulated",
        f"-I{CSRC}",
        f"-I{HERE}",
    ),
]
SEEDS = 10

# The names are written out here so that a case cannot vanish unnoticed; `test_lists` compares.
FEATURES = [
    "asynchronous_copies",
    "atomics",
    "cooperative_grid",
    "directed_rounding_double",
    "directed_rounding_float",
    "grids_and_blocks",
    "halves",
    "impossible_launches",
    "integer_intrinsics",
    "last_block",
    "masks_in_branches",
    "matrix_loads",
    "process_threads",
    "reductions",
    "rounding_edges",
    "rows",
    "shared_tiles",
    "shuffles_of_all_types",
    "tensor_products",
    "tf32_rounding",
    "vectors",
    "votes_and_matches",
    "voting_barriers",
]

# What the report of each planted fault must say. A missing barrier shows as a race or, where
# nothing was stored yet, as an uninitialised read.
EARLY = "race|uninitialised shared memory"
NEVER = "can never complete|has exited"
FAULTS = {
    "missing_barrier": EARLY,
    "missing_second_barrier": "shared memory race",
    "divergent_barrier": "divergent barrier",
    "exited_thread": NEVER,
    "load_out_of_bounds": "global load out of bounds: element 64 of 64",
    "vector_out_of_bounds": "global load out of bounds: elements 64 to 67 of 64",
    "store_out_of_bounds": "global store out of bounds: element -1 of 64",
    "shared_out_of_bounds": "shared store out of bounds: element 64 of 64",
    "dynamic_out_of_bounds": "dynamic shared memory at bytes 4 to 260 of the launch's 256",
    "misaligned_vector": "misaligned global load of 16 bytes",
    "misaligned_shared": "misaligned shared store of 16 bytes",
    "global_write_race": "global memory race: store",
    "global_read_race": "global memory race",
    "atomic_and_plain": "global memory race",
    "missing_fence": "global memory race: load",
    "missing_syncwarp": EARLY,
    "shuffle_is_no_fence": "shared memory race: load",
    "syncwarp_of_halves": EARLY,
    "uninitialised_shared": "uninitialised shared memory: load",
    "absent_lane": "__shfl_xor_sync (with mask 0xf{8} names lane|can never complete)",
    "mask_without_caller": "lacks the calling lane 31",
    "source_outside_mask": "which mask 0x[0f]{8} does not name",
    "mismatched_masks": "names lane|can never complete|deadlock",
    "barrier_in_warp_branch": "divergent warp|deadlock|can never complete|has exited",
    "deadlock": "deadlock",
    "livelock": "no progress",
    "copy_before_wait": "cp.async data used before its wait",
    "copy_waits_too_little": "cp.async data used before its wait",
    "copy_without_barrier": f"{EARLY}|cp.async data used before its wait",
    "missing_grid_sync": "global memory race",
    "misaligned_ldmatrix": "misaligned shared load of 16 bytes",
}


def compile_all(folder, programs, extra=()):
    """Compiles every source, two at a time, and links the programs."""
    compiler = os.environ.get("CXX", "c++")
    sources = [HERE / f"{name}.cu" for program in programs for name in PROGRAMS[program]]
    sources += [HERE / f"{name}.cpp" for name in RUNTIME]
    flags = [*FLAGS, *extra]
    run_all(
        [
            compiler,
            *flags,
            "-x",
            "c++",
            "-c",
            str(source),
            "-o",
            str(folder / f"{source.stem}.o"),
        ]
        for source in sources
    )
    run_all(
        [
            *(compiler, *flags, "-o", str(folder / program)),
            *(str(folder / f"{name}.o") for name in [*parts, *RUNTIME]),
            "-ldl",
        ]
        for program, parts in PROGRAMS.items()
        if program in programs
    )
    return folder


def run_all(commands):
    """Runs all commands, two at a time; each must succeed."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for result in pool.map(
            lambda command: subprocess.run(command, capture_output=True, text=True, check=False),
            commands,
        ):
            assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return compile_all(tmp_path_factory.mktemp("emulator"), PROGRAMS)


def run(program, *arguments, env=None):
    result = subprocess.run(
        [str(program), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def marked_lines(fault):
    text = (HERE / "faults.cu").read_text().splitlines()
    return {i for i, line in enumerate(text, 1) if line.endswith(f"// FAULT {fault}")}


def test_lists(programs):
    assert sorted(run(programs / "features").split()) == sorted(FEATURES)
    assert sorted(run(programs / "faults").split()) == sorted(FAULTS)


@pytest.mark.parametrize("case", FEATURES)
def test_feature(programs, case):
    for seed in (0, 1, 2):
        run(programs / "features", case, env={"FUSEE_EMULATOR_SEED": str(seed)})


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(programs, fault):
    lines = marked_lines(fault)
    assert lines, "the source marks no line"
    # Each seed of the livelock costs what it takes to lose patience.
    seeds = 2 if fault == "livelock" else SEEDS
    reports = run(programs / "faults", fault, "fault", seeds).splitlines()
    assert len(reports) == seeds
    for report in reports:
        assert re.search(FAULTS[fault], report), report
        assert report.startswith(f"emulated kernel {fault}<true>, block ("), report
        named = re.search(r"at faults\.cu:(\d+)$", report)
        assert named and int(named.group(1)) in lines, report


@pytest.mark.parametrize("fault", FAULTS)
def test_clean_twin_passes(programs, fault):
    assert run(programs / "faults", fault, "clean", SEEDS).split() == ["clean"] * SEEDS


def counters(programs, case):
    result = json.loads(run(programs / "traffic", case))
    (kernel,) = result["kernels"]
    for name, value in kernel.items():
        assert name in ("name", "sites") or result["totals"][name] == value
    return kernel


@pytest.mark.parametrize(
    ("case", "requests", "bytes_", "sectors"),
    [
        # 256 threads are 8 warps; a warp's 32 floats are 4 sectors where they are neighbours.
        ("coalesced", 8, 1024, 32),
        ("stride_2", 8, 1024, 64),
        ("stride_8", 8, 1024, 256),
        ("misplaced", 8, 1024, 40),
        ("wide", 8, 4096, 128),
        # All lanes of a request want the same 4 bytes.
        ("broadcast", 4, 16, 4),
        # Lanes 0 to 15 pass the loop three times, the others twice.
        ("ragged_loop", 3, 320, 10),
    ],
)
def test_sectors(programs, case, requests, bytes_, sectors):
    loads = counters(programs, case)["global_load"]
    assert (loads["requests"], loads["bytes"], loads["sectors"]) == (
        requests,
        bytes_,
        sectors,
    )
    assert loads["sector_efficiency"] == pytest.approx(bytes_ / (32 * sectors), rel=1e-4)
    assert loads["sectors_per_request"] == pytest.approx(sectors / requests, rel=1e-4)


def test_reading_twice_shows(programs):
    kernel = counters(programs, "twice")
    assert kernel["launches"] == kernel["blocks"] == 3
    assert kernel["threads"] == 3 * 128
    assert kernel["name"].endswith("twice")
    assert kernel["global_load"]["bytes"] == 3 * 1024
    assert kernel["unique_bytes_loaded"] == 3 * 512
    assert kernel["global_store"]["bytes"] == kernel["unique_bytes_stored"] == 3 * 512
    sites = [site for site in kernel["sites"] if site["kind"] == "global_load"]
    assert [site["counts"]["bytes"] for site in sites] == [3 * 512] * 2
    assert all(re.fullmatch(r"traffic\.cu:\d+", site["where"]) for site in sites)


@pytest.mark.parametrize(
    ("case", "wavefronts", "ideal"),
    [
        ("banks_1", 1, 1),
        ("banks_2", 2, 1),
        ("banks_32", 32, 1),
        ("banks_33", 1, 1),
        ("banks_half", 1, 1),
        # 16-byte accesses go by quarters of a warp.
        ("banks_wide", 4, 4),
        ("banks_wide_32", 32, 4),
    ],
)
def test_bank_conflicts(programs, case, wavefronts, ideal):
    stores = counters(programs, case)["shared_store"]
    assert (stores["wavefronts"], stores["ideal_wavefronts"]) == (wavefronts, ideal)
    assert stores["bank_conflicts"] == wavefronts - ideal
    assert stores["requests"] == 1


def test_other_counts(programs):
    kernel = counters(programs, "everything")
    assert (kernel["blocks"], kernel["barriers"], kernel["mma"]) == (2, 2, 2)
    # ldmatrix reads 8 rows of 16 bytes for each of its matrices: four and two.
    assert kernel["shared_load"]["bytes"] == 2 * (4 + 2) * 8 * 16
    assert kernel["shared_load"]["wavefronts"] == 2 * (4 + 2)
    assert kernel["global_atomic"]["requests"] == 2


def test_poison_is_nan(programs):
    run(programs / "traffic", "poison")


def test_schedule_follows_seed(programs):
    run(programs / "traffic", "seeds")


def test_speed(programs):
    """500 blocks of 128 threads with 4 barriers and 20 shuffles, at most 2 ms each."""
    command = [str(programs / "traffic"), "busy"]
    before = os.times()
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    after = os.times()
    used = after.children_user - before.children_user
    assert used / 500 < 2e-3, f"{used / 500 * 1e3:.2f} ms for each block"


def test_address_sanitizer(tmp_path):
    compiler = os.environ.get("CXX", "c++")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    flags = ["-fsanitize=address", "-fno-omit-frame-pointer"]
    command = [compiler, *flags, str(probe), "-o", str(tmp_path / "probe")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        pytest.skip(f"{compiler} has no AddressSanitizer here: {built.stderr[-200:]}")
    compile_all(tmp_path, ["features", "faults"], [*flags, "-O0"])
    run(tmp_path / "features", *FEATURES)
    # With its stack frames on the heap each fiber needs a heap of its own, which is slow.
    env = {"ASAN_OPTIONS": "detect_stack_use_after_return=1"}
    run(
        tmp_path / "features",
        "masks_in_branches",
        "cooperative_grid",
        "halves",
        env=env,
    )
    for fault in FAULTS:
        if fault != "livelock":
            run(tmp_path / "faults", fault, "fault", 1)


def test_without_assembly(programs, tmp_path):
    """Processors for which there is no hand-written context switch use the C library's."""
    compiler = os.environ.get("CXX", "c++")
    objects = [programs / f"{name}.o" for name in [*PROGRAMS["features"], *RUNTIME[1:]]]
    run_all(
        [
            [
                *(
                    compiler,
                    *FLAGS,
                    "-DFUSEE_UCONTEXT",
                    str(HERE / "fiber.cpp"),
                    "-ldl",
                ),
                *(*map(str, objects), "-o", str(tmp_path / "features")),
            ]
        ]
    )
    run(tmp_path / "features", "reductions", "masks_in_branches", "cooperative_grid")


def test_nvcc_reads_the_same_source(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc on this machine")
    run_all(
        [
            *(nvcc, "-std=c++20", "-arch=sm_90", "--expt-relaxed-constexpr"),
            "-Werror=all-warnings",
            # The host's exact arithmetic is in long double; nvcc fears for the device.
            "-diag-suppress=20208",
            *("-DFUSEE_ENGINE_NAMESPACE=cuda_engine", f"-I{CSRC}", f"-I{HERE}", "-c"),
            *(str(HERE / f"{source}.cu"), "-o", str(tmp_path / f"{source}.o")),
        ]
        for source in PROGRAMS["features"]
    )
