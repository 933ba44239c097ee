"""What a GPU says of the kernels, in one command: stages that check and time them.

stages             which stages there are, what each may take
stage_runner       runs each in processes of its own, with a time limit; gpu_results keeps what came
stage_process      such a process; stage_tasks has what it is told
gpu_machine        what the machine is
gpu_tables         the tables of kernels/README.md from the results
saved_partials     a model's partials in a file; record_partials makes it
work/              what the stages do; tests share its cases
"""
