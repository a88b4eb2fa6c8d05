package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The stage is our own binary as the first process in the namespaces that run made. It waits until
// the network is there, mounts the command's files, and becomes the command by execve, so that the
// command is run's own child.
//
//	run                                  stage
//	clone with new namespaces ───────▶   read the pipe
//	attach, confine                        │
//	terminal handed over                   │
//	config, end of file ─────────────▶   mounts, execve
//	wait4 ◀──────────────────────────    (the command's status, or ours: 125, 126, 127)
//
// When run dies first, the pipe ends without a config, and later the kernel sends SIGKILL.

// stageName is argv[0] of the stage; argv[1] is the pipe's descriptor.
const stageName = "usernet-run-stage"

// A stageConfig is what goes over the pipe, as JSON.
type stageConfig struct {
	Parent int // run's PID
	Argv   []string
	Files  []etcFile
	Dirs   []etcDir
}

func isStage(args []string) bool { return len(args) == 2 && args[0] == stageName }

// stageMain returns an exit status if it does not become the command.
func stageMain(args []string) int {
	status, err := stage(args[1])
	if err != nil {
		fmt.Fprintf(os.Stderr, "usernet: %v\n", err)
	}
	return status
}

func stage(pipe string) (int, error) {
	// A terminal's Ctrl-C during our own start is run's to answer; it ends us.
	fd, err := strconv.Atoi(pipe)
	if err != nil || fd < 3 {
		return statusOurs, fmt.Errorf("%s is a part of usernet: it is not for use by hand", stageName)
	}
	unix.CloseOnExec(fd)
	var c stageConfig
	err = json.NewDecoder(os.NewFile(uintptr(fd), "pipe")).Decode(&c)
	if errors.Is(err, io.EOF) {
		return statusOurs, nil // run has given up, and said why
	}
	if err != nil {
		return statusOurs, fmt.Errorf("read from usernet run: %w", err)
	}
	warnings, err := mountEtc(c.Files, c.Dirs)
	for _, w := range warnings {
		fmt.Fprintf(os.Stderr, "usernet: warning: %v\n", w)
	}
	if err != nil {
		return statusOurs, err
	}
	path, err := exec.LookPath(c.Argv[0])
	if err != nil && !errors.Is(err, exec.ErrDot) { // the user's PATH may say "."
		return execStatus(c.Argv[0], err), fmt.Errorf("%s: %w", c.Argv[0], reason(err))
	}
	// The signal comes when the thread ends that started us, which run keeps to its end. It belongs to this thread,
	// which is the one that calls execve.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return statusOurs, fmt.Errorf("prctl(PR_SET_PDEATHSIG): %w", err)
	}
	if os.Getppid() != c.Parent {
		return statusOurs, nil // it died before that
	}
	signal.Reset()
	err = syscall.Exec(path, c.Argv, os.Environ())
	if errors.Is(err, unix.ENOEXEC) { // a script without "#!" is for sh, as execvp(3) has it
		err = syscall.Exec("/bin/sh", append([]string{"sh", path}, c.Argv[1:]...), os.Environ())
	}
	return execStatus(path, err), explainExec(path, err)
}

// explainExec names the file that execve missed where it is not the command's own: the interpreter of a script.
func explainExec(path string, err error) error {
	if name := interpreter(path); name != "" {
		if _, missing := os.Stat(name); missing != nil {
			return fmt.Errorf("%s: bad interpreter %s: %w: install it, or correct the first line of the script", path, name, err)
		}
	}
	return fmt.Errorf("%s: %w", path, err)
}

// interpreter is what stands behind "#!" at the head of a script, "" where nothing does.
func interpreter(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 256) // BINPRM_BUF_SIZE, all that the kernel reads
	n, _ := io.ReadFull(f, head)
	text, script := strings.CutPrefix(string(head[:n]), "#!")
	if !script {
		return ""
	}
	text, _, _ = strings.Cut(text, "\n")
	if words := strings.FieldsFunc(text, func(r rune) bool { return r == ' ' || r == '\t' }); len(words) > 0 {
		return words[0]
	}
	return ""
}

// reason takes the words of os/exec away, which say the name again.
func reason(err error) error {
	var e *exec.Error
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

// execStatus is the status that shells and env(1) give a command that could not be started.
func execStatus(name string, err error) int {
	missing := errors.Is(err, exec.ErrNotFound) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)
	if missing && !inPath(name) {
		return statusNotFound
	}
	return statusNotExecutable
}

// inPath tells whether a bare name is that of a file in PATH after all, which os/exec passes over when it
// is not executable.
func inPath(name string) bool {
	if filepath.Base(name) != name {
		return false
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		if fi, err := os.Stat(filepath.Join(dir, name)); err == nil && fi.Mode().IsRegular() {
			return true
		}
	}
	return false
}
