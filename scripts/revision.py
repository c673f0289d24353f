# SPDX-License-Identifier: GPL-2.0-or-later
"""Build another revision of this repository, to be measured beside this one.

It is built by its own scripts, from its own files, in a tree and a build
directory of its own.  That is kept in the cache by the revision's name.
"""
import os
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def git(*args):
    return subprocess.run(['git', *args], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout.strip()


def build(rev, cache):
    """Returns (name, build directory) of @rev."""
    name = git('rev-parse', '--short=12', rev + '^{commit}')
    top = os.path.join(cache, 'revisions', name)
    tree, files = os.path.join(top, 'qemu'), os.path.join(top, 'files')
    if not os.path.exists(files):
        os.makedirs(top, exist_ok=True)
        subprocess.run(['rm', '-rf', files + '.new', tree], check=True)
        os.mkdir(files + '.new')
        archive = subprocess.run(['git', 'archive', name], cwd=ROOT,
                                 check=True, capture_output=True).stdout
        subprocess.run(['tar', '-x', '-C', files + '.new'], input=archive,
                       check=True)
        subprocess.run(['cp', '-a', os.path.join(cache, 'qemu'), tree],
                       check=True)
        subprocess.run([os.path.join(ROOT, 'scripts/integrate'), '--revert',
                        tree], check=True)
        os.rename(files + '.new', files)
    target = os.path.join(top, 'build')
    subprocess.run(['scripts/build-qemu', '--tree', tree, '--build', target],
                   cwd=files, check=True,
                   env=dict(os.environ, CCACHE_DIR=os.environ.get(
                       'CCACHE_DIR', os.path.join(cache, 'ccache'))))
    return name, target


def has(rev, path):
    """Is there such a file in @rev?"""
    return subprocess.run(['git', 'cat-file', '-e', f'{rev}:{path}'], cwd=ROOT,
                          check=False, capture_output=True).returncode == 0
