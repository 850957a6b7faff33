"""What a process gives up once it no longer needs it: privileges, system calls, places to write."""
