"""The machines compiled for, described to XLA's compilers without having one."""

import os
from typing import Any, NamedTuple


class Target(NamedTuple):
    """Chips of one kind, and the compiler that makes programs for them."""

    compiler: str
    topology: str
    chips: int
    description: str = ""

    def devices(self) -> list[Any]:
        """Devices that programs can be compiled for, and not run on."""
        from jax.experimental import topologies  # noqa: PLC0415 - in the child only

        if self.compiler == "tpu":
            per_host = {1: (1, 1, 1), 4: (2, 2, 1)}.get(self.chips, (2, 4, 1))
            found: Any = topologies.get_topology_desc(
                platform="tpu",
                topology_name=self.topology,
                chips_per_host_bounds=per_host,
            )
        else:
            found = topologies.get_topology_desc(
                platform="cuda", topology=self.topology, target_config=self.description
            )
        devices: list[Any] = list(found.devices)
        return devices


def gpu(
    name: str,
    *,
    capability: int,
    processors: int,
    lanes: int,
    shared_kib: int,
    cache_mib: int,
    bandwidth: float,
    clock: float,
) -> str:
    """The text form of XLA's description of an NVIDIA GPU with 80 GiB."""
    device = {
        "core_count": processors,
        "fpus_per_core": lanes,
        "clock_rate_ghz": clock,
        "memory_bandwidth": round(bandwidth * 1e12),
        "device_memory_size": 80 * 2**30,
        "l2_cache_size": cache_mib * 2**20,
        "shared_memory_per_core": shared_kib * 2**10,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": (shared_kib - 1) * 2**10,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "threads_per_core_limit": 2048,
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
    }
    limits = " ".join(f"{key}: {value}" for key, value in device.items())
    return (
        f"gpu_device_info {{ {limits} cuda_compute_capability {{ major: {capability} }}"
        ' } platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        f'runtime_version {{ major: 12 minor: 8 }} device_description_str: "{name}"'
    )


H100 = gpu(
    "NVIDIA H100 80GB HBM3",
    capability=9,
    processors=132,
    lanes=128,
    shared_kib=228,
    cache_mib=50,
    bandwidth=3.35,
    clock=1.98,
)
A100 = gpu(
    "NVIDIA A100-SXM4-80GB",
    capability=8,
    processors=108,
    lanes=64,
    shared_kib=164,
    cache_mib=40,
    bandwidth=2.04,
    clock=1.41,
)
TARGETS = {
    "v5e": Target("tpu", "v5e:1x1", 1),
    "v5e 2x2": Target("tpu", "v5e:2x2", 4),
    "v5e 4x4": Target("tpu", "v5e:4x4", 16),
    "v5e 8x8": Target("tpu", "v5e:8x8", 64),
    "v5e 16x16": Target("tpu", "v5e:16x16", 256),
    "v5p 2x2x1": Target("tpu", "v5p:2x2x1", 4),
    "v6e 2x2": Target("tpu", "v6e:2x2", 4),
    "H100": Target("cuda", "1x1x1", 1, H100),
    "8 H100": Target("cuda", "1x1x8", 8, H100),
    "A100": Target("cuda", "1x1x1", 1, A100),
}
VARIABLES = {  # of the process that compiles
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to fight over
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # which would time kernels on a GPU
}
