// Where a thread is in its workgroup.

struct Place {
    @builtin(local_invocation_index) thread: u32,
}
