// Where a thread is in its workgroup and in its subgroup. Which threads share a subgroup is the driver's choice: nothing here may be derived
// from anything else. Workgroups are multiples of 64 threads, so subgroups are full.

struct Place {
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
}
